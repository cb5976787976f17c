"""Time by phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch.profiler import record_function


class Phases:
    """Names the parts of a step for the profiler and, if asked, times them.

    Timing waits for the device at both ends of a phase, which a training loop does not: the phases say where the time
    goes, the throughput is measured without them.

    Args:
        device: "cpu" or "cuda".
        timed: whether to time at all; may be changed between steps.
    """

    def __init__(self, device: str, timed: bool) -> None:
        self.device = device
        self.timed = timed
        self._running: dict[str, float] = defaultdict(float)
        self._blocks: list[dict[str, float]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The block belongs to this phase; a phase may have several blocks in a step."""
        if not self.timed:
            with record_function(name):
                yield
            return
        self._wait()
        start = time.perf_counter()
        with record_function(name):
            yield
        self._wait()
        self._running[name] += time.perf_counter() - start

    def end_of_block(self, steps: int) -> None:
        """Close a block of steps; of each phase their mean is kept, as workers make some steps wait for several."""
        self._blocks.append({name: seconds / steps for name, seconds in self._running.items()})
        self._running.clear()

    def milliseconds(self) -> dict[str, float]:
        """Median of each phase over the blocks."""
        names = list(dict.fromkeys(name for block in self._blocks for name in block))
        return {name: 1e3 * median(block.get(name, 0.0) for block in self._blocks) for name in names}

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
