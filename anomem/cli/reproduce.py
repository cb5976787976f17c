"""`anomem reproduce EXPERIMENT`: the paper's experiments as sweeps that resume."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anomem.errors import UserError

Name = Literal["table6", "table7", "backbones", "figure5", "ablation", "margin", "protocol", "mvtec"]
Data = Literal["cifar10", "cifar100", "digits", "textures", "elpv"]


@dataclass(frozen=True)
class Reproduce:
    """Run an experiment of the paper, or go on with it: tables, backbones, figure 5, ablation, margins, protocols."""

    experiment: tyro.conf.Positional[Name]
    """table6: weight of the variance term, linear evaluation. table7: lambda_s. figure5: t-SNE and overlap.
    margin: M fixed and adaptive. protocol: one-class and 1, 5, 10% labelled anomalies. mvtec: all classes of a folder.
    backbones: encoders compared. ablation: one part left out at a time."""
    data: Data | None = None
    """Data set; digits when not given. mvtec reads --data.root instead."""
    root: Annotated[Path, tyro.conf.arg(name="data.root")] = Path("data")
    """Folder with the files of cifar10 and cifar100, or of mvtec with a folder for each class."""
    output: Path | None = None
    """Folder of rows, table and pictures; runs/reproduce/EXPERIMENT-DATA when not given.
    Finished cells do not run again."""
    classes: tuple[str, ...] = ()
    """Normal classes; all when not given."""
    settings: tuple[str, ...] = ()
    """Lines of the table to run; all when not given."""
    seeds: tuple[int, ...] | None = None
    """Seeds of split and training; three when not given (figure5 and mvtec: one)."""
    epochs: int | None = None
    """Passes over the training images, to scale down; the preset's when not given (cifar: the paper's 200)."""
    steps: int | None = None
    """Gradient steps of stage 1, in place of --epochs."""
    subset: int | None = None
    """At most so many training normals and test images of each kind, to scale down."""
    jobs: int | None = None
    """Cells at a time, in processes that share the threads; one a core when not given, one with a GPU or CIFAR."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …"""
    table_only: bool = False
    """Run nothing: write table and pictures of the rows that are there."""
    quiet: bool = False
    """Print only the table's file."""


def reproduce(command: Reproduce, arguments: list[str]) -> None:
    """Run the missing cells, then write the table and the picture.

    Args:
        command: parsed.
        arguments: as typed, for the files.
    """
    from anomem.reproduce.pictures import draw
    from anomem.reproduce.protocol import FOLDERS, Scale
    from anomem.reproduce.sweep import Sweep, check_folder, run
    from anomem.reproduce.tables import write_table

    folders = command.experiment == "mvtec"
    if folders and command.data is not None:
        raise UserError("`--data`: mvtec runs on the folders of --data.root and takes no data set")
    data = FOLDERS if folders else command.data or "digits"
    name = command.root.resolve().name if folders else data
    output = command.output or Path("runs/reproduce") / f"{command.experiment}-{name}"
    sweep = Sweep(
        command.experiment,
        data,
        output,
        str(command.root),
        command.classes,
        command.settings,
        command.seeds,
        Scale(command.epochs, command.steps, command.subset),
        command.jobs,
        command.device,
        shlex.join(["anomem", *arguments]),
    )
    if command.table_only:
        check_folder(sweep)
    else:
        with Grid(command.quiet, f"{command.experiment} {name}") as grid:
            run(sweep, grid.say)
    draw(output)
    table = write_table(output)
    if not command.quiet:
        Console(width=None if sys.stdout.isatty() else 120).print(table.read_text(encoding="utf-8"), markup=False)
    print(table)


class Grid:
    """A bar over the whole grid on a terminal, a line for each cell elsewhere.

    Args:
        quiet: show nothing.
        title: of the bar.
    """

    def __init__(self, quiet: bool, title: str) -> None:
        self.quiet = quiet
        self.bar = None
        if not quiet and sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("left"),
            )  # fmt: skip
            self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> Grid:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        """Show a line of the sweep."""
        if self.bar is not None:
            if line.startswith("["):
                done, total = line[1 : line.index("]")].split("/")
                self.bar.update(self.task, completed=int(done), total=int(total))
            self.bar.console.print(line, markup=False, highlight=False)
        elif not self.quiet:
            print(line, flush=True)
