"""Solar cells (`elpv`): filled memories and their controls. `python -m benchmarks.accuracy.cells` runs what is missing.

The images are under CC BY-NC-SA 4.0: they are measured on, and neither they nor pictures of them are kept.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from anomem.data import DataConfig, ResidentImages, Task
from anomem.data.convert import resize
from anomem.data.elpv import TYPES, Cells, Split, cells_task, load_cells, split_cells
from anomem.data.task import outlier_count
from anomem.evaluate.fitted import encoder_baselines, pixel_baselines
from anomem.evaluate.metrics import auroc
from anomem.models import AnoMem
from anomem.scoring import Calibration, FillConfig, FilledScorer, fill_memories, fit_detector
from anomem.scoring.fitted import FEW, EncodedImages
from anomem.scoring.fitted import ROWS as ENOUGH
from anomem.train import FitConfig, preset
from anomem.train.fitting import model_to_fit, resolved
from anomem.validation import require_choice
from benchmarks.accuracy.settings import one_prototype, trained, untrained
from benchmarks.harness import rows

ROWS = "elpv.jsonl"
SEEDS = (0, 1, 2)
SIDE, MIDDLE, LARGE = 128, 160, 192
"""Pixels: the default of a folder; a larger size, chosen on seed 0; and one at which the rivals are higher on poly."""
SPLITS, FITS = 100, 10
"""Resampled splits of the normals into fitted, calibrating and new ones, and the fits they share."""
RESAMPLED = FillConfig(method="random", prototypes=(256,))
ALPHAS = (0.01, 0.05)


@dataclass(frozen=True)
class Setting:
    """What is fitted to the training cells."""

    measure: Callable[[Cut, Setting], list[Found]]
    fill: FillConfig = field(default_factory=FillConfig)
    size: int = SIDE
    labels: float = 0.0
    """Labelled defects as a part of the normals."""
    weights: str = "default"


@dataclass(frozen=True)
class Found:
    """One score of the test cells and what the verdict made of it."""

    score: str
    auroc: float
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of a row."""


@dataclass(frozen=True)
class Cut:
    """One split of the cells of one type."""

    kind: str
    seed: int

    @functools.cached_property
    def split(self) -> Split:
        """Rows of the cells."""
        return split_cells(cells_of(self.kind, SIDE).probabilities, self.kind, self.seed)

    @property
    def test(self) -> Tensor:
        """Rows of the test cells, normals first."""
        return torch.cat([self.split.test_normal, self.split.test_defect])

    @property
    def is_defect(self) -> Tensor:
        """Of the test cells."""
        return torch.arange(len(self.test)) >= len(self.split.test_normal)

    def found(self, scores: Mapping[str, Tensor], **measured: Any) -> list[Found]:
        """Of scores of the test cells."""
        return [Found(name, auroc(of_cell, self.is_defect), measured) for name, of_cell in scores.items()]


@functools.cache
def cells_of(kind: str, size: int | None) -> Cells:
    """The cells of one type; the files are read once."""
    return load_cells(kind, None) if size is None else resized(cells_of(kind, None), size)


def resized(cells: Cells, size: int) -> Cells:
    """The same cells at another size."""
    return cells._replace(images=resize(cells.images, size))


def task_of(cut: Cut, size: int) -> Task:
    """The task of a split."""
    config = DataConfig(dataset="elpv", normal=cut.kind, seed=cut.seed, image_size=size)
    return cells_task(cells_of(cut.kind, size), cut.kind, config)


@functools.lru_cache(maxsize=6)
def encoded(kind: str, size: int, weights: str) -> tuple[EncodedImages, float]:
    """All cells of one type as the frozen encoder gives them, and CPU seconds per cell."""
    config = resolved(FitConfig(data=DataConfig(dataset="elpv", normal=kind), weights=weights), quiet=True)
    task = task_of(Cut(kind, 0), size)
    images = ResidentImages(cells_of(kind, size).images)
    begin = time.process_time()
    found = EncodedImages(model_to_fit(config, task), images, 64, at_most=2**31)
    return found, (time.process_time() - begin) / len(images)


def filled(cut: Cut, setting: Setting) -> list[Found]:
    """Every score after a fit to all normals."""
    everything, per_cell = encoded(cut.kind, setting.size, setting.weights)
    begin = time.process_time()
    scorer, test = fitted(everything, cut.split.train, setting.fill), everything.rows(cut.test)
    seconds = time.process_time() - begin + per_cell * len(cut.split.train)
    parts = [scorer.of_queries(queries, (1, 1)).scores for queries in test]
    return cut.found(
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        fit_seconds=round(seconds, 2),
        memory_bytes=sum(memory.prototypes.nbytes for memory in scorer.model.memories),
    )


def fitted(everything: EncodedImages, normals: Tensor, fill: FillConfig) -> FilledScorer:
    """Memories filled from some cells, and scores fitted to them."""
    model: AnoMem = everything.model
    for memory, features in zip(model.memories, model.features, strict=True):
        memory.beta = fill.beta_factor / features**0.5
    few = len(normals) < FEW
    queries = everything.with_copies(normals, ENOUGH, 0) if few else everything.rows(normals)
    fill_memories(model, queries, fill.prototypes, fill.method)
    scorer = FilledScorer(model, "per_position", fill.top_fraction, fill.top_k)
    scorer.fit(queries)
    return scorer


def judged(cut: Cut, setting: Setting) -> list[Found]:
    """The leading score with what its verdict did: 30% of the normals calibrate."""
    everything, per_cell = encoded(cut.kind, setting.size, setting.weights)
    normals, count = cut.split.train, outlier_count(len(cut.split.train), setting.labels, len(cut.split.pool))
    training = torch.cat([normals, cut.split.pool[:count]])
    begin = time.process_time()
    detector, _ = fit_detector(
        everything.model,
        everything.part(training),
        torch.arange(len(training)) < len(normals),
        aligned=True,
        config=setting.fill,
        seed=cut.seed,
    )
    seconds = time.process_time() - begin + per_cell * len(training)
    parts = [detector.of_queries(queries, (1, 1)) for queries in everything.rows(cut.test)]
    verdicts = torch.cat([part.verdicts for part in parts if part.verdicts is not None])
    return cut.found(
        {detector.lead: torch.cat([part.scores[detector.lead] for part in parts])},
        fit_seconds=round(seconds, 2),
        false_alarms=float(verdicts[~cut.is_defect].double().mean()),
        found=float(verdicts[cut.is_defect].double().mean()),
        alpha=detector.alpha,
    )


def rivals(cut: Cut, setting: Setting) -> list[Found]:
    """PatchCore and PaDiM on the same encoder."""
    everything, _ = encoded(cut.kind, setting.size, setting.weights)
    return cut.found(encoder_baselines(everything.part(cut.split.train), everything.part(cut.test), cut.seed))


def pixels(cut: Cut, setting: Setting) -> list[Found]:
    """Scores of standardised pixels, and brightness."""
    return cut.found(pixel_baselines(task_of(cut, SIDE)))


def resampled(cut: Cut, setting: Setting) -> list[Found]:
    """False alarms over splits of all normals: 40% fitted, 36% calibrate, 24% new; all cells with a defect are new."""
    everything, _ = encoded(cut.kind, setting.size, setting.weights)
    probabilities = cells_of(cut.kind, SIDE).probabilities
    normals, defects = (probabilities == 0).nonzero().flatten(), (probabilities == 1).nonzero().flatten()
    generator = torch.Generator().manual_seed(cut.seed)
    alarms: dict[float, list[float]] = {alpha: [] for alpha in ALPHAS}
    hits: dict[float, list[float]] = {alpha: [] for alpha in ALPHAS}
    aurocs = []
    for _ in range(FITS):
        order = normals[torch.randperm(len(normals), generator=generator)]
        fit_rows, others = order[: int(0.4 * len(order))], order[int(0.4 * len(order)) :]
        scorer = fitted(everything, fit_rows, setting.fill)
        lead = scorer.lead
        queries = everything.rows(torch.cat([others, defects]))
        scores = torch.cat([scorer.of_queries(q, (1, 1)).scores[lead] for q in queries])
        aurocs.append(auroc(scores, torch.arange(len(scores)) >= len(others)))
        for _ in range(SPLITS // FITS):
            shuffled = torch.randperm(len(others), generator=generator)
            calibrating, new = shuffled[: int(0.6 * len(others))], shuffled[int(0.6 * len(others)) :]
            calibration = Calibration({lead: scores[calibrating]})
            for alpha in ALPHAS:
                alarms[alpha].append(float(calibration.anomalous(lead, scores[new], alpha).double().mean()))
                hits[alpha].append(float(calibration.anomalous(lead, scores[len(others) :], alpha).double().mean()))
    mean_auroc = sum(aurocs) / len(aurocs)
    return [
        Found(
            f"{lead}, alpha {alpha:.0%}",
            mean_auroc,
            {
                "alpha": alpha,
                "false_alarms": sum(alarms[alpha]) / SPLITS,
                "found": sum(hits[alpha]) / SPLITS,
                "splits": SPLITS,
                "normals": len(normals),
            },
        )
        for alpha in ALPHAS
    ]


def few_normals(cut: Cut, setting: Setting) -> list[Found]:
    """Fits to 1, 4 and 16 normals: the mean of three draws of them."""
    everything, _ = encoded(cut.kind, setting.size, setting.weights)
    found = []
    for count in (1, 4, 16):
        parts = []
        for draw in range(3):
            generator = torch.Generator().manual_seed(draw)
            order = torch.randperm(len(cut.split.train), generator=generator)
            scorer = fitted(everything, cut.split.train[order[:count]], setting.fill)
            scored = [scorer.of_queries(queries, (1, 1)).scores[scorer.lead] for queries in everything.rows(cut.test)]
            parts.append(auroc(torch.cat(scored), cut.is_defect))
        found.append(Found(f"{scorer.lead}, {count} normal{'s' if count > 1 else ''}", sum(parts) / len(parts)))
    return found


def from_scratch(cut: Cut, setting: Setting) -> list[Found]:
    """The preset's small encoder on 64 pixels: trained, without a gradient step, and with M = 1."""
    config = preset("elpv")
    config = replace(config, data=replace(config.data, normal=cut.kind, seed=cut.seed))
    config = replace(config, run=replace(config.run, seed=cut.seed, device="cpu"))
    task = task_of(cut, 64)
    return [
        Found(f"{name}, {score}", metrics[score]["auroc"])
        for name, measure in (("trained", trained), ("untrained", untrained), ("M = 1", one_prototype))
        for metrics in (measure(config, task),)
        for score in ("plain", "detector")
    ]


def filled_with(**values: Any) -> Setting:
    """Filled memories at the default size."""
    return Setting(filled, FillConfig(**values))


FIRST: dict[str, Setting] = {
    "k-means 1024": Setting(filled),
    "rivals": Setting(rivals),
    "pixels": Setting(pixels),
    "verdict": Setting(judged),
    "5% labelled": Setting(judged, labels=0.05),
    "k-means 1024, 160 px": Setting(filled, size=MIDDLE),
    "5% labelled, 160 px": Setting(judged, size=MIDDLE, labels=0.05),
    "k-means 1024, 192 px": Setting(filled, size=LARGE),
    "rivals, 192 px": Setting(rivals, size=LARGE),
}
THEN: dict[str, Setting] = {
    "100 splits": Setting(resampled, RESAMPLED),
    "few-shot": Setting(few_normals),
    "1% labelled": Setting(judged, labels=0.01),
    "10% labelled": Setting(judged, labels=0.1),
    "verdict, 160 px": Setting(judged, size=MIDDLE),
    "k-means 1024, mean of all positions": filled_with(top_fraction=1.0),
    "coreset 10%, nearest neighbour": filled_with(method="coreset", prototypes=(0.1,), beta_factor=1000.0),
    "k-means 1%": filled_with(prototypes=(0.01,)),
    "one prototype": filled_with(prototypes=(1,)),
    "random weights": Setting(filled, weights="none"),
}
FILLS = {
    f"{name} {count}": filled_with(method=method, prototypes=(count,))
    for method, name in (("kmeans", "k-means"), ("coreset", "coreset"), ("random", "random"))
    for count in (64, 256, 1024, 2048)
    if (method, count) != ("kmeans", 1024)
}
LAST = {"from scratch, 64 px": Setting(from_scratch)}
ONCE = ("100 splits",)
"""Settings that do not depend on the seed's split."""
SETTINGS = {**FIRST, **THEN, **FILLS, **LAST}


@dataclass
class CellRow:
    """One score of one setting on one split."""

    kind: str
    seed: int
    setting: str
    score: str
    auroc: float
    commit: str
    dirty: bool
    torch: str
    processor: str
    threads: int
    false_alarms: float | None = None
    """Part of the test normals that the verdict at alpha calls anomalous."""
    found: float | None = None
    """Part of the test defects that it calls anomalous."""
    alpha: float | None = None
    fit_seconds: float | None = None
    """CPU time of encoding, filling and fitting."""
    memory_bytes: int | None = None
    """Of all prototypes."""
    splits: int | None = None
    """Resampled splits of which false_alarms and found are means."""
    normals: int | None = None
    """Cells without a defect that were split."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The last row for the same score of the same setting counts."""
        return self.kind, self.seed, self.setting, self.score


@dataclass(frozen=True)
class Options:
    """Defects of solar cells by filled memories, rivals on the same encoder, and pixels."""

    results: Path = rows.RESULTS
    """Folder of elpv.jsonl; splits and settings that it holds are not run again."""
    seeds: tuple[int, ...] = SEEDS
    """Splits to run."""
    settings: tuple[str, ...] = ()
    """Settings to run; all when empty."""
    again: bool = False
    """Run also what the file holds; the new rows count."""


def main(options: Options) -> None:
    """Run what is missing, the most wanted first."""
    for name in options.settings:
        require_choice(name, "settings", tuple(SETTINGS))
    torch.set_num_threads(1)
    path = options.results / ROWS
    done = set() if options.again else {(r.kind, r.seed, r.setting) for r in rows.read(path, CellRow)}
    for group in (FIRST, THEN, FILLS, LAST):
        for seed in options.seeds:
            for kind in TYPES:
                for name, setting in group.items():
                    wanted = (name in options.settings or not options.settings) and (name not in ONCE or seed == 0)
                    if not wanted or (kind, seed, name) in done:
                        continue
                    found = setting.measure(Cut(kind, seed), setting)
                    rows.append(path, *(row_of(kind, seed, name, one) for one in found))
                    told = ", ".join(f"{one.score} {one.auroc:.4f}" for one in found)
                    print(f"{kind} seed {seed}, {name}: {told}", flush=True)


def row_of(kind: str, seed: int, setting: str, found: Found) -> CellRow:
    """The row of one score."""
    about = rows.about("cpu")
    return CellRow(
        kind=kind,
        seed=seed,
        setting=setting,
        score=found.score,
        auroc=found.auroc,
        commit=about["commit"],
        dirty=about["dirty"],
        torch=about["torch"],
        processor=about["device_name"],
        threads=about["threads"],
        **found.measured,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.accuracy.cells", description=Options.__doc__))
