"""`python -m benchmarks.batch_memory`: peak memory of a training step over batches, at once and by gradient caching."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from anomem.data import ResidentImages
from anomem.models import build_model
from anomem.train.batches import Batch, training_batches
from anomem.train.execution import arrange, settled
from anomem.train.network import Network
from anomem.train.ranks import ONE
from anomem.train.steps import Stage1Step
from benchmarks.harness import rows
from benchmarks.harness.console import say
from benchmarks.harness.measure import end_phase, peak_bytes
from benchmarks.harness.rows import Step
from benchmarks.profile_training import MEAN, STD, config_of, random_images


@dataclass(frozen=True)
class Options:
    """Which batches."""

    batches: tuple[int, ...] = (128, 512, 2048)
    """B."""
    micro_batch: int = 128
    """Images encoded at once by gradient caching."""
    at_once: int = 512
    """Largest batch that is also encoded at once."""
    once_from: int = 65536
    """From this batch on, one step alone: its time is that under torch's profiler, which measures its memory."""
    side: int = 32
    """Pixels of an image's side."""
    json: Path = rows.RESULTS / "cpu-batches.jsonl"
    """File of rows."""


def main(options: Options) -> int:
    """Measure the small encoder on the CPU."""
    title = f"Stage 1, small, {options.side}×{options.side} pixels, micro-batches of {options.micro_batch}"
    found = []
    for batch in options.batches:
        for micro in (None, options.micro_batch):
            if micro is None and batch > options.at_once:
                continue
            config = config_of("small", "native", batch, "cpu")
            config = replace(config, optimizer=replace(config.optimizer, micro_batch=micro))
            config = settled(config, torch.device("cpu"))
            images = ResidentImages(random_images(batch, options.side))
            model = build_model(config.model, images.size, images.channels, MEAN, STD).train()
            arrange(model, config.run)
            step = Stage1Step(model, Network(model, ONE), images, None, config, ONE)
            shares = step.shares
            (given,) = training_batches(images, batch, 0, 0, 1, shares.places, at_once=shares.at_once)
            step._contrasted = functools.partial(_phase, step._contrasted)  # type: ignore[method-assign]
            taken: list[Taken] = []
            timed = functools.partial(_timed, step, given, taken)
            for _ in range(0 if batch >= options.once_from else 2):
                timed()
            peak = peak_bytes(timed, "cpu")
            processor, seconds, vectors = taken[1] if len(taken) > 1 else taken[0]
            precision = config.run.precision
            name = f"{'at once' if micro is None else 'gradient caching'}, B = {batch}"
            say(f"{name}: {peak / 2**20:.1f} MiB, vectors {vectors / 2**20:.1f}, {processor:.2f} s of processor time")
            found.append(
                Step(
                    pipeline=name,
                    title=title,
                    config={
                        "batch": batch,
                        "micro_batch": micro,
                        "precision": precision,
                        "vectors": vectors,
                    },
                    about=rows.about("cpu"),
                    seconds_per_step=seconds,
                    milliseconds={},
                    peak_bytes=peak,
                    images_per_second=batch / seconds,
                    cpu_seconds_per_step=processor,
                )
            )
    known = {row.key: row for row in [*rows.read(options.json, Step), *found]}
    rows.write(
        options.json, sorted(known.values(), key=lambda row: (row.config["batch"], bool(row.config["micro_batch"])))
    )
    return 0


class Taken(NamedTuple):
    """A step that was taken."""

    processor: float
    """Its processor time in seconds."""
    clock: float
    """Its time on the clock in seconds."""
    vectors: int
    """Bytes of its sampled vectors."""


def _timed(step: Stage1Step, batch: Batch, taken: list[Taken]) -> None:
    """Take a step and tell of it."""
    began, clock = time.process_time(), time.perf_counter()
    sampled = step(batch).sampled
    vectors = sum(x.numel() * x.element_size() for x in sampled)
    taken.append(Taken(time.process_time() - began, time.perf_counter() - clock, vectors))


def _phase(call: Callable[..., Any], *given: Any) -> Any:
    """The call as a phase of its own: encoding ends before it and goes on after it."""
    end_phase()
    found = call(*given)
    end_phase()
    return found


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.batch_memory", description=__doc__)))
