"""Images per second of a fitted detector beside those of its encoder alone. `python -m benchmarks.scoring`.

Solar cells at 128 pixels, k-means fills, everything by default: from pixels in memory to scores, p-values, verdicts and
maps, as `anomem score` calls it. CPU time of one thread; both take turns on the same batch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from anomem.data import DataConfig
from anomem.data.elpv import load_cells, split_cells
from anomem.scoring import FillConfig, FittedDetector
from anomem.train import FitConfig
from anomem.train.fitting import fit
from benchmarks.harness import rows
from benchmarks.harness.console import say
from benchmarks.harness.measure import Timed, take_turns

ROWS = "scoring.jsonl"
AIMS = {1024: 0.95, 4096: 0.85}
"""Least part of the encoder's images per second."""
SIZE, BATCH = 128, 64


@dataclass
class ScoringRow:
    """The encoder or the detector with a memory of M prototypes."""

    prototypes: int
    """M asked for; no scale has more than it has features of normals."""
    what: str
    """"encoder" or "detector"."""
    size: int
    """Side of the images in pixels."""
    batch: int
    milliseconds: dict[str, float]
    """p20, p50 and p80 of a batch, CPU time."""
    repeats: int
    commit: str
    dirty: bool
    torch: str
    processor: str
    threads: int

    @property
    def key(self) -> tuple[Any, ...]:
        """The last row counts."""
        return self.prototypes, self.what, self.size, self.batch


@dataclass(frozen=True)
class Options:
    """What is measured."""

    prototypes: tuple[int, ...] = tuple(AIMS)
    """M of each memory."""
    repeats: int = 15
    """Batches of each."""
    results: Path = rows.RESULTS
    """Folder of scoring.jsonl."""


@dataclass
class Turn(Timed):
    """The encoder or the detector on one batch."""

    what: str


def main(options: Options) -> None:
    """Measure and write rows."""
    torch.set_num_threads(1)
    cells = load_cells("mono", SIZE)
    split = split_cells(cells.probabilities, "mono", 0)
    test = cells.images[split.test_normal[: BATCH // 2].tolist() + split.test_defect[: BATCH // 2].tolist()]
    for count in options.prototypes:
        config = FitConfig(data=DataConfig(dataset="folder", image_size=SIZE), fill=FillConfig(prototypes=(count,)))
        measured = in_turns(fit(cells.images[split.train], config=config), test, options.repeats)
        about = rows.about("cpu")
        found = [
            ScoringRow(
                prototypes=count,
                what=turn.what,
                size=SIZE,
                batch=len(test),
                milliseconds=turn.milliseconds(),
                repeats=len(turn.seconds),
                commit=about["commit"],
                dirty=about["dirty"],
                torch=about["torch"],
                processor=about["device_name"],
                threads=about["threads"],
            )
            for turn in measured
        ]
        rows.append(options.results / ROWS, *found)
        encoder, detector = (row.milliseconds["p50"] for row in found)
        say(f"M = {count}: encoder {encoder:.1f} ms, detector {detector:.1f} ms a batch, {encoder / detector:.1%}")


def in_turns(detector: FittedDetector, images: torch.Tensor, repeats: int) -> list[Turn]:
    """CPU seconds of the encoder and of the whole detector, batch by batch."""

    def timed(call: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            begin = time.process_time()
            with torch.no_grad():
                call()
            return time.process_time() - begin

        return once

    calls = {"encoder": timed(lambda: detector.model(images)), "detector": timed(lambda: detector(images))}
    turns = [Turn(once=call, what=what) for what, call in calls.items()]
    for turn in turns:
        turn.once()
    take_turns(turns, lambda turn: len(turn.seconds) >= repeats, most=repeats)
    return turns


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.scoring", description=__doc__))
