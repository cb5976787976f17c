"""`make demo`: AnoMem on real images in a few minutes, against shallow baselines and an untrained encoder.

Solar cells, fitted and decided in seconds; digits 3, 8 and 9 in the paper's one-class setting; one texture with heat
maps of its scratches. Finished runs are reused.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anomem.errors import UserError
from anomem.train.config import TrainConfig, preset

DIGITS = ("3", "8", "9")
FOLDER = Path("runs/demo")
CELLS = "elpv-dataset, Buerhop-Lutz et al. 2018, CC BY-NC-SA 4.0; not for redistribution with this library"
# Label of a row -> its keys in metrics.json.
ROWS = (
    ("AnoMem, Gaussian on the deviation maps", ("scores", "detector")),
    ("AnoMem, plain deviation", ("scores", "plain")),
    ("AnoMem, plain deviation + location prior", ("scores", "prior")),
    ("untrained encoder, Gaussian on the deviation maps", ("controls", "untrained", "detector")),
    ("untrained encoder, plain deviation", ("controls", "untrained", "plain")),
    ("raw pixels, three nearest neighbours", ("baselines", "kNN-3")),
    ("raw pixels, one-class SVM", ("baselines", "one-class SVM")),
    ("raw pixels, local outlier factor", ("baselines", "LOF")),
    ("raw pixels, isolation forest", ("baselines", "isolation forest")),
)


def configurations() -> dict[str, TrainConfig]:
    """Name of each run of the demo -> its configuration."""
    digits = preset("digits")
    runs = {f"digits-{digit}": replace(digits, data=replace(digits.data, normal=digit)) for digit in DIGITS}
    textures = preset("textures")
    runs["brick-scratches"] = replace(textures, data=replace(textures.data, normal="brick", anomalies="scratch"))
    return {
        name: replace(config, run=replace(config.run, directory=str(FOLDER / name))) for name, config in runs.items()
    }


def run(name: str, config: TrainConfig, console: Console) -> dict[str, Any]:
    """Train, measure and draw one run, or continue from what its directory holds.

    Args:
        name: of the run, for the headline.
        config: with its run directory.
        console: to print to.

    Returns:
        The content of `metrics.json`.
    """
    from anomem.evaluate.report import control, report
    from anomem.plots.run import draw_figures
    from anomem.train.run import load_run, resume, train

    path = FOLDER / name
    console.rule(name)
    if (path / "metrics.json").exists():
        console.print(f"{path} is there already; delete {FOLDER} to start over")
        metrics: dict[str, Any] = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        return metrics
    if (path / "config.json").exists():
        resume(path)
    else:
        train(config)
    opened, config, task, scorer = load_run(path)
    console.print("fitting the baselines and the untrained control, drawing the figures …")
    controls = {"untrained": control("untrained", config, task)}
    metrics = report(scorer, task, config.augment, seed=config.run.seed, controls=controls)
    draw_figures(opened.rows(), task, scorer, opened.figures, config.run.seed)
    opened.write_metrics(metrics)
    return metrics


def cells(console: Console) -> None:
    """Fit a detector to real solar cells, decide about others, and draw the heat maps into the run directory.

    Args:
        console: to print to.

    Raises:
        UserError: the cells or the encoder's weights are not installed.
    """
    from anomem.cli.commands import metrics_table
    from anomem.data import DataConfig
    from anomem.evaluate.fitted import explained, report
    from anomem.plots.run import draw_fitted
    from anomem.train import FitConfig, RunConfig
    from anomem.train.fitting import fit_run, load_fitted_run

    path = FOLDER / "cells"
    console.rule("solar cells: is this one defective?")
    if (path / "metrics.json").exists():
        console.print(f"{path} is there already; delete {FOLDER} to start over")
        metrics: dict[str, Any] = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    else:
        if not (path / "config.json").exists():
            data = DataConfig(dataset="elpv", normal="mono")
            fit_run(FitConfig(data=data, encoder="efficientnet_lite0", run=RunConfig(directory=str(path))))
        opened, config, task, detector = load_fitted_run(path)
        console.print("scoring the test cells, fitting the rivals, drawing the heat maps …")
        found = detector.over(task.test, maps=False)
        metrics = report(detector, task, config, found)
        draw_fitted(task, detector, opened.figures)
        opened.write_metrics(metrics)
    console.print(metrics_table(metrics))
    for line in explained(metrics)[-2:]:
        console.print(line, markup=False)
    console.print(f"Heat maps: {path}/figures/extremes.png (images: {CELLS})", markup=False)


def auroc_of(metrics: dict[str, Any], place: tuple[str, ...], measure: str = "auroc") -> float | None:
    """One number of `metrics.json`, None if the run has none."""
    found: Any = metrics
    for key in place:
        found = found.get(key, {})
    value: float | None = found.get(measure)
    return value


def table(results: dict[str, dict[str, Any]]) -> Table:
    """AUROC of every score on every run, and the pixel AUROC of the run with masks.

    Args:
        results: name of a run -> its metrics.
    """
    digits = [name for name in results if name.startswith("digits")]
    shown = Table(title="AUROC on held-out images; one-class training, no anomaly seen")
    shown.add_column("score")
    for name in (*digits, "digits, mean", "brick-scratches", "its pixels"):
        shown.add_column(name.replace("-", " "), justify="right")
    for label, place in ROWS:
        values = [auroc_of(results[name], place) for name in digits]
        known = [v for v in values if v is not None]
        texture = results["brick-scratches"]
        numbers = [
            *values,
            statistics.mean(known) if known else None,
            auroc_of(texture, place),
            auroc_of(texture, place, "pixel_auroc"),
        ]
        shown.add_row(label, *("" if v is None else f"{v:.3f}" for v in numbers))
    return shown


def main() -> int:
    """Run the demo. Returns the exit code: 0, or 2 for something the user can mend."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        try:
            cells(console)
        except UserError as error:  # an optional part: the rest of the demo needs neither cells nor weights
            console.print(f"left out: {error}", markup=False)
        results = {name: run(name, config, console) for name, config in configurations().items()}
    except UserError as error:
        print(f"anomem demo: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"anomem demo: needs the extra `lab` ({error}); install anomem[lab]", file=sys.stderr)
        return 2
    console.print()
    console.print(table(results))
    console.print(
        "Digits are easy: three nearest neighbours on raw pixels are almost perfect, and an untrained encoder with the "
        "same scoring does as well as a trained one, so the gain of AnoMem on digits comes from the scoring. The last "
        "column shows what training does for locating defects."
    )
    console.print(
        f"Figures: {FOLDER}/*/figures/*.png; the scratches' heat maps: {FOLDER}/brick-scratches/figures/extremes.png"
    )
    console.print(
        "Your own images next: a folder DIR of normal ones, and test ones in DIR/test/<kind> if there are any, then\n"
        "  anomem fit DIR --run.directory runs/mine && anomem score --run runs/mine IMAGES…\n"
        "  anomem evaluate runs/mine && anomem plot runs/mine",
        markup=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
