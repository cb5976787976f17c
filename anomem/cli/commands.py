"""The commands fit, train, evaluate and plot, each with its options; `score` has a file of its own.

Imports that take a second wait until the command is known.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomem.cli.writing import ROWS, begins, write_rows
from anomem.errors import UserError
from anomem.files import Guard, printable
from anomem.train.config import FitConfig, Preset, TrainConfig, preset

if TYPE_CHECKING:
    from torch import Tensor

    from anomem.data import Task
    from anomem.train.rundir import RunDirectory


@dataclass(frozen=True)
class Train:
    """Train a detector and write a run directory."""

    preset: Preset | None = None
    """Settings to start from; that of --data.dataset when not given."""
    config: Path | None = None
    """Settings to start from: the config.json of a run. Options on the command line come on top."""
    resume: Path | None = None
    """Go on with the run in this directory; its own settings are used."""
    quiet: bool = False
    """Print only the run directory."""
    profile: int | None = None
    """Train no run: print where the time of so many steps goes, and write a trace of them.
    Of several processes the first does so."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Fit:
    """Fit a detector to good images in seconds, without training: yes or no at a false-alarm rate you choose."""

    folder: tyro.conf.Positional[Path | None] = None
    """Folder of good images, or with train/good; labelled defects, if any, in DIR/anomalous. Short for --data.root."""
    quiet: bool = False
    """Print only the run directory."""
    settings: Annotated[FitConfig, tyro.conf.arg(name="")] = field(default_factory=FitConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on its test images, next to baselines and controls; writes metrics.json and scores.csv."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    controls: tuple[Literal["untrained", "one_prototype"], ...] = ()
    """Fair controls to compute as well: the untrained encoder; the whole training with one prototype."""
    baselines: bool = True
    """Fit kNN, one-class SVM, LOF and isolation forest on raw pixels."""
    overwrite: bool = False
    """Replace files of the run directory that anomem did not write."""
    device: str | None = None
    """In place of the run's: cpu, cuda or cuda:N."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Folder of the run's images where they have moved."""


@dataclass(frozen=True)
class Plot:
    """Draw the figures of a run into its folder figures/."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    device: str | None = None
    """In place of the run's: cpu, cuda or cuda:N."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Folder of the run's images where they have moved."""
    overwrite: bool = False
    """Replace figures that anomem did not write."""


def train(command: Train) -> None:
    """Train a new run, or continue one."""
    from anomem.train import run

    if command.profile is not None:
        from anomem.train.profiling import profile_steps

        if command.resume is not None:
            raise UserError("`--profile` trains no run: leave out --resume, and give the run's config.json as --config")
        found = profile_steps(command.settings, command.profile)
        if found is not None:
            print(f"{found.table()}\ntrace of {command.profile} steps in {found.trace}; open it in ui.perfetto.dev")
        return
    if command.resume is None:
        path = run.train(command.settings, quiet=command.quiet)
    else:
        if command.settings != preset("digits") or command.config or command.preset:
            raise UserError("`--resume` goes on with the settings of the run: give no others")
        path = run.resume(command.resume, quiet=command.quiet)
    if os.environ.get("RANK", "0") != "0":  # the first process of torchrun's speaks
        return
    where = shlex.quote(str(path))
    following = f"anomem evaluate {where}, or anomem score --run {where} FILES"
    print(path if command.quiet else f"run written to {path}; next: {following}")


def fit(command: Fit) -> None:
    """Fit a detector and write a run directory."""
    from anomem.train.fitting import fit_run

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a fit takes seconds and runs in one process: start it without torchrun")
    config = command.settings
    if command.folder is not None:
        if config.data.dataset != "folder":
            raise UserError(f"`--data.dataset`: {config.data.dataset} reads no folder; give one of both")
        if config.data.root != FitConfig().data.root:
            raise UserError(f"`--data.root`: the folder is {command.folder} already; give one of both")
        config = replace(config, data=replace(config.data, root=str(command.folder)))
    elif config.data == FitConfig().data:
        raise UserError("`folder`: expected a folder of good images, received none")
    path = fit_run(config, quiet=command.quiet)
    following = f"anomem score --run {shlex.quote(str(path))} FILES"
    print(path if command.quiet else f"run written to {path}; next: {following}")


def evaluate(command: Evaluate) -> None:
    """Measure a run; write metrics.json and scores.csv."""
    from anomem.train.rundir import RunDirectory

    if RunDirectory(command.run).is_fitted():
        _evaluate_fitted(command)
    else:
        _evaluate_trained(command)


def _evaluate_fitted(command: Evaluate) -> None:
    from anomem.evaluate.fitted import explained, report
    from anomem.train.fitting import load_fitted_run

    if command.controls:
        raise UserError(f"`--controls`: {command.run} was not trained, so that it has no controls of a training")
    run, config, task, detector = load_fitted_run(command.run, device=command.device, root=command.root)
    _guard_results(run, command.overwrite)
    found = detector.over(task.test, maps=task.test_masks is not None)
    write_rows(run.scores_file, _score_rows(task, {**found.scores, "p_value": found.p_values}))
    metrics = report(detector, task, config, found, with_baselines=command.baselines)
    run.write_metrics(metrics)
    Console(width=None if sys.stdout.isatty() else 100).print(metrics_table(metrics))
    print("\n".join(explained(metrics)))
    print(f"written to {run.metrics_file}, image by image to {run.scores_file}; next: anomem plot {command.run}")


def _guard_results(run: RunDirectory, overwrite: bool) -> None:
    guard = Guard(overwrite=overwrite)
    guard.require(run.scores_file, "RUN", lambda path: begins(path, ROWS))
    guard.require(run.metrics_file, "RUN", lambda path: begins(path, re.compile(rb'\{\s*"task": ')))


def _evaluate_trained(command: Evaluate) -> None:
    from anomem.evaluate.baselines import require_packages
    from anomem.evaluate.report import control, explained, report
    from anomem.scoring import score_images
    from anomem.train.run import load_run

    if command.baselines:
        require_packages()
    run, config, task, scorer = load_run(command.run, device=command.device, root=command.root)
    _guard_results(run, command.overwrite)
    scored = score_images(scorer, task.test)
    write_rows(run.scores_file, _score_rows(task, scored.scores))
    controls = {str(name): control(name, config, task) for name in command.controls}
    try:
        metrics = report(
            scorer,
            task,
            config.augment,
            scored=scored,
            seed=config.run.seed,
            controls=controls,
            with_baselines=command.baselines,
        )
    except ImportError as error:
        raise UserError(
            f"the baselines need a package that cannot be imported ({error}); or give --no-baselines"
        ) from error
    run.write_metrics(metrics)
    Console(width=None if sys.stdout.isatty() else 100).print(metrics_table(metrics))
    print("\n".join(explained(metrics)))
    print(f"written to {run.metrics_file}, image by image to {run.scores_file}; next: anomem plot {command.run}")


def _score_rows(task: Task, scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row per test image: name, kind, label and all scores."""
    names = task.test_paths or [str(i) for i in range(len(task.test))]
    return [
        {
            "path": names[i],
            "kind": task.test_kinds[i],
            "anomalous": int(task.test_is_anomaly[i]),
            **{name: float(values[i]) for name, values in scores.items()},
        }
        for i in range(len(task.test))
    ]


def metrics_table(metrics: dict[str, Any]) -> Table:
    """`metrics.json` as a table.

    Args:
        metrics: from `report`.
    """
    title = f"{metrics['task']}: {metrics['test_images']} test images, {metrics['test_anomalies']} anomalous"
    table = Table(title=Text(printable(title)))  # as Text, since a name may look like rich's markup
    table.add_column("score")
    # A measure that no score has needs no column.
    columns = {
        "auroc": "AUROC",
        "average_precision": "AP",
        "fpr_at_95_tpr": "FPR@95%TPR",
        "pixel_auroc": "pixel AUROC",
        "aupro": "AUPRO@30%",
    }
    columns = {measure: heading for measure, heading in columns.items() if measure not in metrics["missing"]}
    for heading in columns.values():
        table.add_column(heading, justify="right")
    groups = {
        "": metrics["scores"],
        **{f"{name}: ": scores for name, scores in metrics["controls"].items()},
        **({"raw pixels: ": metrics["baselines"]} if "same_encoder" not in metrics else {}),
        "same encoder: ": metrics.get("same_encoder", {}),
        "pixels: ": metrics["baselines"] if "same_encoder" in metrics else {},
    }
    for prefix, scores in groups.items():
        # The scores that `anomem score` gives by default come first; the variants of "plain" last.
        first = metrics.get("lead", "stage2")
        for name in sorted(scores, key=lambda name: ("/" in name, name != first, name != "detector")):
            table.add_row(prefix + name, *(f"{scores[name][m]:.4f}" if m in scores[name] else "" for m in columns))
        table.add_section()
    return table


def plot(command: Plot) -> None:
    """Draw the figures of a run and print their files."""
    from anomem.plots.run import draw_figures, draw_fitted, figure_files
    from anomem.plots.style import is_figure
    from anomem.train.fitting import load_fitted_run
    from anomem.train.run import load_run
    from anomem.train.rundir import RunDirectory

    guard = Guard(overwrite=command.overwrite)
    for path in figure_files(RunDirectory(command.run).figures).values():
        guard.require(path, "RUN", is_figure)
    if RunDirectory(command.run).is_fitted():
        run, _, task, detector = load_fitted_run(command.run, device=command.device, root=command.root)
        drawn = draw_fitted(task, detector, run.figures)
    else:
        run, config, task, scorer = load_run(command.run, device=command.device, root=command.root)
        drawn = draw_figures(run.rows(), task, scorer, run.figures, config.run.seed)
    for path in drawn:
        print(path)
