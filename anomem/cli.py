"""The command `anomem`: train, evaluate, score, plot.

Exit codes: 0 done, 1 a fault of the program, 2 something the user can mend (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from anomem import __version__
from anomem.errors import UserError
from anomem.train.config import TrainConfig
from anomem.train.presets import NAMES, preset
from anomem.train.serialize import load_config


@dataclass(frozen=True)
class Train:
    """Train a detector and write a run directory."""

    preset: Literal["digits", "textures", "cifar10", "cifar100", "folder"] | None = None
    """Settings to start from; that of --data.dataset when not given."""
    config: Path | None = None
    """Settings to start from: the config.json of a run. Options on the command line come on top."""
    resume: Path | None = None
    """Go on with the run in this directory; its own settings are used."""
    quiet: bool = False
    """Print only the run directory."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on its test images, next to baselines and controls; writes metrics.json."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    controls: tuple[Literal["untrained", "one_prototype"], ...] = ()
    """Fair controls to compute as well: the untrained encoder; the whole training with one prototype."""
    baselines: bool = True
    """Fit kNN, one-class SVM, LOF and isolation forest on raw pixels."""


@dataclass(frozen=True)
class Score:
    """Score image files with a trained run; higher is more anomalous."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    run: Path
    """Run directory."""
    by: str | None = None
    """Which score: plain, prior, energy, detector or stage2; stage2 where the run has one, else detector."""
    output: Path | None = None
    """Write a .csv or .json file with all scores instead of printing one."""


@dataclass(frozen=True)
class Plot:
    """Draw the figures of a run into its folder figures/."""

    run: tyro.conf.Positional[Path]
    """Run directory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; those of the process when None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"anomem {__version__}")
        return 0
    try:
        command = _parse(arguments)
        {Train: _train, Evaluate: _evaluate, Score: _score, Plot: _plot}[type(command)](command)
    except UserError as error:
        print(f"anomem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "anomem: interrupted; a run goes on from its last checkpoint with `anomem train --resume`", file=sys.stderr
        )
        return 130
    except SystemExit as stop:  # tyro: help, or a wrong option
        return int(stop.code or 0)
    return 0


def _parse(arguments: list[str]) -> Any:
    start = _starting_point(arguments[1:]) if arguments[:1] == ["train"] else TrainConfig()
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(settings=start))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Score, tyro.conf.subcommand("score")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
    )
    return tyro.cli(commands, args=arguments, prog="anomem", description="Anomaly detection with contrasted memories.")


def _starting_point(arguments: list[str]) -> TrainConfig:
    """The settings that options are laid over: a file's, a preset's, or the preset of the data set named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--config", "--data.dataset"):
        parser.add_argument(name, default=None)
    try:
        known, _ = parser.parse_known_args(arguments)
    except SystemExit:  # an option without its value: tyro says so better
        return TrainConfig()
    if known.config is not None:
        if known.preset is not None:
            raise UserError("`--preset` and `--config` are both settings to start from: give one of them")
        return load_config(TrainConfig, Path(known.config))
    name = known.preset or vars(known)["data.dataset"] or "digits"
    return preset(name) if name in NAMES else TrainConfig()


def _train(command: Train) -> None:
    from anomem.train.run import resume, train

    if command.resume is None:
        path = train(command.settings, quiet=command.quiet)
    else:
        if command.settings != preset("digits") or command.config or command.preset:
            raise UserError("`--resume` goes on with the settings of the run: give no others")
        path = resume(command.resume, quiet=command.quiet)
    print(path if command.quiet else f"run written to {path}; next: anomem evaluate {path}")


def _evaluate(command: Evaluate) -> None:
    from anomem.evaluate.report import report
    from anomem.train.controls import control
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    controls = {name: control(name, config, task) for name in command.controls}
    try:
        metrics = report(
            scorer, task, config.augment, seed=config.run.seed, controls=controls, with_baselines=command.baselines
        )
    except ImportError as error:
        raise UserError(
            f"the baselines need a package that cannot be imported ({error}); or give --no-baselines"
        ) from error
    run.write_metrics(metrics)
    Console(width=None if sys.stdout.isatty() else 100).print(_table(metrics))
    print(f"written to {run.metrics_file}; next: anomem plot {command.run}")


def _table(metrics: dict[str, Any]) -> Table:
    table = Table(
        title=f"{metrics['task']}: {metrics['test_images']} test images, {metrics['test_anomalies']} anomalous"
    )
    table.add_column("score")
    for name in ("AUROC", "AP", "FPR@95%TPR", "pixel AUROC"):
        table.add_column(name, justify="right")
    groups = {
        "": metrics["scores"],
        **{f"{name}: ": scores for name, scores in metrics["controls"].items()},
        "raw pixels: ": metrics["baselines"],
    }
    for prefix, scores in groups.items():
        for name, values in scores.items():
            pixel = values.get("pixel_auroc")
            numbers = (values["auroc"], values["average_precision"], values["fpr_at_95_tpr"], pixel)
            table.add_row(prefix + name, *("" if v is None else f"{v:.4f}" for v in numbers))
        table.add_section()
    return table


def _score(command: Score) -> None:
    import torch

    from anomem.data import ImageFiles, StreamedImages, image_files
    from anomem.evaluate.scoring import score_images
    from anomem.train.run import load_scorer

    if command.output is not None and command.output.suffix not in (".csv", ".json"):
        raise UserError(f"`--output`: expected a .csv or .json file, received {command.output}")
    paths = [file for path in command.paths for file in (image_files(path) if path.is_dir() else [path])]
    if not paths:
        raise UserError("`paths`: expected image files or folders of them, received none")
    scorer = load_scorer(command.run)
    height, _ = scorer.model.encoder.image_size
    files = ImageFiles(paths, height, grey=scorer.model.mean.shape[0] == 1)
    with torch.no_grad():
        scores = score_images(scorer, StreamedImages(files, workers=0, device=scorer.model.mean.device)).scores
    by = command.by or ("stage2" if "stage2" in scores else "detector")
    if by not in scores:
        raise UserError(f"`--by`: expected one of {', '.join(scores)}, received {by!r}")
    rows = [
        {"path": str(path), **{name: float(values[i]) for name, values in scores.items()}}
        for i, path in enumerate(paths)
    ]
    if command.output is None:
        for row in rows:
            print(f"{row[by]:.6g}\t{row['path']}")
    else:
        _write(command.output, rows)
        print(f"{len(rows)} scores written to {command.output}")


def _write(output: Path, rows: list[dict[str, Any]]) -> None:
    if output.suffix == ".json":
        text = json.dumps(rows, indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error


def _plot(command: Plot) -> None:
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    print(run.figures, config, task, scorer)
