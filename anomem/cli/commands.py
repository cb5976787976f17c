"""What each command does. Imports that cost a second wait until the command is known."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anomem.cli.options import Evaluate, Plot, Score, Train
from anomem.errors import UserError
from anomem.files import write_atomically
from anomem.train.presets import preset


def train(command: Train) -> None:
    """Train, or go on training."""
    from anomem.train import run

    if command.resume is None:
        path = run.train(command.settings, quiet=command.quiet)
    else:
        if command.settings != preset("digits") or command.config or command.preset:
            raise UserError("`--resume` goes on with the settings of the run: give no others")
        path = run.resume(command.resume, quiet=command.quiet)
    following = f"anomem evaluate {path}, or anomem score --run {path} FILES"
    print(path if command.quiet else f"run written to {path}; next: {following}")


def evaluate(command: Evaluate) -> None:
    """Measure a run."""
    from anomem.evaluate.report import report
    from anomem.train.controls import control
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    controls = {str(name): control(name, config, task) for name in command.controls}
    try:
        metrics = report(
            scorer, task, config.augment, seed=config.run.seed, controls=controls, with_baselines=command.baselines
        )
    except ImportError as error:
        raise UserError(
            f"the baselines need a package that cannot be imported ({error}); or give --no-baselines"
        ) from error
    run.write_metrics(metrics)
    Console(width=None if sys.stdout.isatty() else 100).print(metrics_table(metrics))
    print(f"written to {run.metrics_file}; next: anomem plot {command.run}")


def metrics_table(metrics: dict[str, Any]) -> Table:
    """`metrics.json` as people read it.

    Args:
        metrics: what `report` gives.
    """
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


def score(command: Score) -> None:
    """Score files."""
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
        write_atomically(output, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error


def plot(command: Plot) -> None:
    """Draw the figures of a run."""
    from anomem.cli.figures import draw_figures
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    for path in draw_figures(run, task, scorer, config.run.seed):
        print(path)
