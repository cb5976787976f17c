"""Solar cells (`elpv`): filled memories and their controls. `python -m benchmarks.accuracy.cells` runs what is missing.

The images are under CC BY-NC-SA 4.0: they are measured on, and neither they nor pictures of them are kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from anomem.data import DataConfig, Task, load_task
from anomem.data.elpv import TYPES
from anomem.evaluate.fitted import encoder_baselines, pixel_baselines, verdict_metrics
from anomem.evaluate.metrics import auroc
from anomem.scoring import FillConfig, FilledScorer, fill_memories, fit_detector
from anomem.scoring.fitted import EncodedImages, FittedDetector
from anomem.train import FitConfig
from anomem.train.fitting import model_to_fit, resolved
from benchmarks.harness import rows

ROWS = "elpv.jsonl"
SEEDS = (0, 1, 2)
FILLS: dict[str, FillConfig] = {
    "k-means 1024": FillConfig(),
    "k-means 64": FillConfig(prototypes=(64,)),
    "coreset 1024": FillConfig(method="coreset"),
    "random 1024": FillConfig(method="random"),
    "one prototype": FillConfig(prototypes=(1,)),
}
"""Fitted to all training normals."""
LABELS = (0.01, 0.05, 0.1)


@dataclass
class CellRow:
    """One score of one setting on one split."""

    kind: str
    seed: int
    setting: str
    score: str
    auroc: float
    false_alarms: float | None
    """Part of the test normals that the verdict at alpha calls anomalous."""
    found: float | None
    """Part of the test defects that it calls anomalous."""
    alpha: float | None
    fit_seconds: float | None
    """CPU time of encoding, filling and fitting."""
    commit: str
    dirty: bool
    torch: str
    processor: str
    threads: int

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
    """Run what is missing."""
    torch.set_num_threads(1)
    path = options.results / ROWS
    done = set() if options.again else {(r.kind, r.seed, r.setting) for r in rows.read(path, CellRow)}
    every = (*FILLS, "random weights", "rivals", "pixels", "verdict", *(f"{part:.0%} labelled" for part in LABELS))
    for seed in options.seeds:
        for kind in TYPES:
            wanted = [s for s in options.settings or every if (kind, seed, s) not in done]
            for setting, measured in split_of(kind, seed, wanted):
                rows.append(path, *measured)
                print(f"{kind} seed {seed}, {setting}: " + ", ".join(f"{r.score} {r.auroc:.4f}" for r in measured))


def split_of(kind: str, seed: int, wanted: list[str]) -> Iterator[tuple[str, list[CellRow]]]:
    """Settings of one split, each with its rows."""
    if not wanted:
        return
    config = resolved(FitConfig(data=DataConfig(dataset="elpv", normal=kind, seed=seed)), quiet=True)
    task = load_task(config.data)
    model = model_to_fit(config, task)
    begin = time.process_time()
    train = EncodedImages(model, task.train, 64)
    encoding = time.process_time() - begin
    test = EncodedImages(model, task.test, 64)
    for setting in wanted:
        begin = time.process_time()
        if setting in FILLS:
            scores, seconds = filled(FILLS[setting], train, test)
            yield setting, made(kind, seed, setting, scores, task, fit_seconds=encoding + seconds)
        elif setting == "random weights":
            other = model_to_fit(replace(config, weights="none"), task)
            encoded = (EncodedImages(other, images, 64) for images in (task.train, task.test))
            scores, _ = filled(FillConfig(), *encoded)
            yield setting, made(kind, seed, setting, scores, task)
        elif setting == "rivals":
            detector, _ = fit_detector(model, *normals(task), aligned=True, config=FillConfig(prototypes=(1,)))
            yield setting, made(kind, seed, setting, encoder_baselines(detector, task, seed), task)
        elif setting == "pixels":
            yield setting, made(kind, seed, setting, pixel_baselines(task), task)
        else:
            labelled = task
            if setting != "verdict":
                part = float(setting.split("%")[0]) / 100
                labelled = load_task(replace(config.data, outlier_ratio=part))
            images, is_normal = labelled.train, labelled.train_is_normal
            detector, _ = fit_detector(model, images, is_normal, aligned=True, config=config.fill, seed=seed)
            yield setting, judged(kind, seed, setting, detector, task, time.process_time() - begin)


def normals(task: Task) -> tuple[Any, Tensor]:
    """Training images and which of them are normal."""
    return task.train, task.train_is_normal


def filled(config: FillConfig, train: EncodedImages, test: EncodedImages) -> tuple[dict[str, Tensor], float]:
    """Scores of the test images after a fit to all normals, and its CPU time."""
    begin = time.process_time()
    everything = train.rows(torch.arange(len(train.images)))
    fill_memories(train.model, everything, config.prototypes, config.method)
    scorer = FilledScorer(train.model, "per_position", config.top_fraction, config.top_k)
    scorer.fit(everything)
    seconds = time.process_time() - begin
    parts = [scorer.of_queries(queries, (1, 1)).scores for queries in test.rows(torch.arange(len(test.images)))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, seconds


def judged(kind: str, seed: int, setting: str, detector: FittedDetector, task: Task, seconds: float) -> list[CellRow]:
    """The leading score with what its verdict did: 30% of the normals calibrate."""
    found = detector.over(task.test)
    verdict = verdict_metrics(detector, found, task.test_is_anomaly)
    return made(
        kind,
        seed,
        setting,
        {detector.lead: found.scores[detector.lead]},
        task,
        fit_seconds=seconds,
        false_alarms=verdict["false_alarms"] / verdict["normals"],
        found=verdict["found"] / verdict["anomalies"],
        alpha=detector.alpha,
    )


def made(kind: str, seed: int, setting: str, scores: dict[str, Tensor], task: Task, **values: Any) -> list[CellRow]:
    """Rows of scores of the test images."""
    about = rows.about("cpu")
    values = {"fit_seconds": None, "false_alarms": None, "found": None, "alpha": None} | values
    if values["fit_seconds"] is not None:
        values["fit_seconds"] = round(values["fit_seconds"], 2)
    return [
        CellRow(
            kind=kind,
            seed=seed,
            setting=setting,
            score=name,
            auroc=auroc(of_image, task.test_is_anomaly),
            commit=about["commit"],
            dirty=about["dirty"],
            torch=about["torch"],
            processor=about["device_name"],
            threads=about["threads"],
            **values,
        )
        for name, of_image in scores.items()
    ]


if __name__ == "__main__":
    main(tyro.cli(Options, description=Options.__doc__))
