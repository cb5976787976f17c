"""What each command does. Imports that cost a second wait until the command is known."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from anomem.cli.options import Evaluate, Plot, Score, Train
from anomem.errors import UserError
from anomem.files import write_atomically
from anomem.train.config import preset

if TYPE_CHECKING:
    from torch import Tensor

    from anomem.data import Task


def train(command: Train) -> None:
    """Train, or go on training."""
    from anomem.train import run

    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"expected one process, received WORLD_SIZE={processes}: a run is trained by one process on one device; "
            "start it without torchrun"
        )
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
    from anomem.evaluate.report import control, report
    from anomem.scoring import score_images
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    scored = score_images(scorer, task.test)
    _write(run.scores_file, _score_rows(task, scored.scores))
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
    print(f"written to {run.metrics_file}, image by image to {run.scores_file}; next: anomem plot {command.run}")


def _score_rows(task: Task, scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row per test image: which it is, what is true of it and all its scores."""
    names = task.test_paths or [str(i) for i in range(len(task.test))]
    return [
        {
            "image": names[i],
            "kind": task.test_kinds[i],
            "anomalous": int(task.test_is_anomaly[i]),
            **{name: float(values[i]) for name, values in scores.items()},
        }
        for i in range(len(task.test))
    ]


def metrics_table(metrics: dict[str, Any]) -> Table:
    """`metrics.json` as people read it.

    Args:
        metrics: what `report` gives.
    """
    table = Table(
        title=f"{metrics['task']}: {metrics['test_images']} test images, {metrics['test_anomalies']} anomalous"
    )
    table.add_column("score")
    for name in ("AUROC", "AP", "FPR@95%TPR", "pixel AUROC", "AUPRO@30%"):
        table.add_column(name, justify="right")
    groups = {
        "": metrics["scores"],
        **{f"{name}: ": scores for name, scores in metrics["controls"].items()},
        "raw pixels: ": metrics["baselines"],
    }
    for prefix, scores in groups.items():
        for name, values in scores.items():
            measures = ("auroc", "average_precision", "fpr_at_95_tpr", "pixel_auroc", "aupro")
            table.add_row(prefix + name, *(f"{values[m]:.4f}" if m in values else "" for m in measures))
        table.add_section()
    return table


def score(command: Score) -> None:
    """Score files."""
    import torch

    from anomem.cli.maps import MapFiles
    from anomem.data import ImageFiles, StreamedImages, image_files
    from anomem.train.run import load_scorer

    if command.output is not None and command.output.suffix not in (".csv", ".json"):
        raise UserError(f"`--output`: expected a .csv or .json file, received {command.output}")
    paths = [file for path in command.paths for file in (image_files(path) if path.is_dir() else [path])]
    if not paths:
        raise UserError("`paths`: expected image files or folders of them, received none")
    scorer = load_scorer(command.run)
    by = command.by or ("detector" if scorer.head is None else "stage2")
    if by not in scorer.names:
        raise UserError(f"`--by`: expected one of {', '.join(scorer.names)}, received {by!r}")
    files = ImageFiles(paths, scorer.model.encoder.image_size, grey=scorer.model.mean.shape[0] == 1)
    images = StreamedImages(files, workers=0, device=scorer.model.device)
    maps = None if command.maps is None else MapFiles(command.maps, paths)
    rows: list[dict[str, Any]] = []
    # Batch by batch: the maps of a large folder would not fit into memory.
    for batch, index in images.batches(torch.arange(len(paths)), scorer.config.batch_size):
        scored = scorer(batch)
        values = {name: numbers.tolist() for name, numbers in scored.scores.items()}
        for i, place in enumerate(index.tolist()):
            rows.append({"path": str(paths[place]), **{name: numbers[i] for name, numbers in values.items()}})
        if maps is not None:
            deviation = scored.maps["plain" if by == "plain" else "detector"].cpu()
            for i, place in enumerate(index.tolist()):
                maps.write(place, deviation[i])
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
    write_atomically(output, text.encode())


def plot(command: Plot) -> None:
    """Draw the figures of a run."""
    from anomem.cli.figures import draw_figures
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    for path in draw_figures(run, task, scorer, config.run.seed):
        print(path)
