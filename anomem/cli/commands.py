"""The four commands, each with its options. Imports that take a second wait until the command is known."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from anomem.data import Dataset
from anomem.errors import UserError
from anomem.files import make_folder, write_atomically
from anomem.train.config import TrainConfig, preset

if TYPE_CHECKING:
    from torch import Tensor

    from anomem.data import Task


@dataclass(frozen=True)
class Train:
    """Train a detector and write a run directory."""

    preset: Dataset | None = None
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
    """Measure a run on its test images, next to baselines and controls; writes metrics.json and scores.csv."""

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
    maps: Path | None = None
    """Also write deviation maps into this folder, a .tiff of float32 for each image, at its size; those of "plain" with
    --by plain, else of "detector"."""


@dataclass(frozen=True)
class Plot:
    """Draw the figures of a run into its folder figures/."""

    run: tyro.conf.Positional[Path]
    """Run directory."""


def train(command: Train) -> None:
    """Train a new run, or continue one."""
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
    """Measure a run; write metrics.json and scores.csv."""
    from anomem.evaluate.report import control, report
    from anomem.scoring import score_images
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    scored = score_images(scorer, task.test)
    _write_rows(run.scores_file, _score_rows(task, scored.scores))
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
    """One row per test image: name, kind, label and all scores."""
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
    """`metrics.json` as a table.

    Args:
        metrics: from `report`.
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
    """Score image files; print one score of each, or write all scores and maps."""
    import torch

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
    maps = None if command.maps is None else _map_files(command.maps, paths)
    rows: list[dict[str, Any]] = []
    # Batch by batch: the maps of a large folder would not fit into memory.
    for batch, index in images.batches(torch.arange(len(paths)), scorer.config.batch_size):
        scored = scorer(batch)
        values = {name: numbers.tolist() for name, numbers in scored.scores.items()}
        for i, place in enumerate(index.tolist()):
            rows.append({"path": str(paths[place]), **{name: numbers[i] for name, numbers in values.items()}})
        if maps is not None:
            deviations = scored.maps["plain" if by == "plain" else "detector"].cpu()
            for i, place in enumerate(index.tolist()):
                _write_map(maps[place], deviations[i], paths[place])
    if command.output is None:
        for row in rows:
            print(f"{row[by]:.6g}\t{row['path']}")
    else:
        _write_rows(command.output, rows)
        print(f"{len(rows)} scores written to {command.output}")


def _map_files(folder: Path, images: Sequence[Path]) -> list[Path]:
    """One .tiff per image in a folder, laid out as the images are.

    Raises:
        UserError: two images differ only in their suffix, so that their maps would be one file.
    """
    absolute = [path.absolute() for path in images]
    common = os.path.commonpath([path.parent for path in absolute])
    files = [(folder / path.relative_to(common)).with_suffix(".tiff") for path in absolute]
    ((file, count),) = Counter(files).most_common(1)
    if count > 1:
        raise UserError(f"`--maps`: expected images of different names, received {count} whose map would be {file}")
    return files


def _write_map(file: Path, deviations: Tensor, image: Path) -> None:
    """Write one deviation map [H, W] as float32, at the size of its image."""
    import torch.nn.functional as F
    from PIL import Image

    from anomem.data import read_image

    size = read_image(image).shape[1:]
    resized = F.interpolate(deviations[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    buffer = io.BytesIO()
    Image.fromarray(resized.numpy()).save(buffer, format="TIFF")
    make_folder(file.parent)
    write_atomically(file, buffer.getvalue())


def _write_rows(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write scores as .csv or .json."""
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
    """Draw the figures of a run and print their files."""
    from anomem.plots.run import draw_figures
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    for path in draw_figures(run.rows(), task, scorer, run.figures, config.run.seed):
        print(path)
