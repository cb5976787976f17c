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
        self._step: dict[str, float] = defaultdict(float)
        self._steps: list[dict[str, float]] = []

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
        self._step[name] += time.perf_counter() - start

    def end_of_step(self) -> None:
        """Close a step."""
        self._steps.append(dict(self._step))
        self._step.clear()

    def milliseconds(self) -> dict[str, float]:
        """Median of each phase over the steps."""
        names = list(dict.fromkeys(name for step in self._steps for name in step))
        return {name: 1e3 * median(step.get(name, 0.0) for step in self._steps) for name in names}

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
