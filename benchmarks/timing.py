"""One timed call.

On a CPU: the wall clock around it. On a GPU: two CUDA events, after the L2 cache was overwritten, behind a delay in
which the host queues the whole call, so that what is timed is the device and not the launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.case import Case, Function
from benchmarks.operators import OPERATORS

_ROTATION_BYTES = {"cpu": 2**27, "cuda": 2**29}
_MOST_SETS = 8
_LAUNCH_CYCLES = 2_000_000  # about a millisecond


class Clock:
    """Times calls on one device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._scratch: torch.Tensor | None = None

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a call, and what it returned."""
        if self.device == "cpu":
            start = time.perf_counter()
            result = call()
            return time.perf_counter() - start, result
        if self._scratch is None:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self._scratch = torch.empty(4 * cache, dtype=torch.uint8, device=self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        torch.cuda._sleep(_LAUNCH_CYCLES)
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, result


class Subject:
    """One implementation of one case with its inputs: random, several sets in rotation, so that no call finds its
    inputs in a cache because the call before read the same ones.

    Args:
        case: what is computed.
        function: who computes it.
        device: "cpu" or "cuda".
        sets: of inputs, from `input_sets`.
    """

    def __init__(self, case: Case, function: Function, device: str, sets: list[tuple[torch.Tensor, ...]]) -> None:
        self.case = case
        self.function = function
        self.clock = Clock(device)
        self.sets = sets
        self._turn = 0
        self._upstream: torch.Tensor | None = None

    def call(self) -> Any:
        """One pass, or both, over the next set of inputs; gradients are returned, so none accumulate."""
        inputs = self.sets[self._turn % len(self.sets)]
        self._turn += 1
        if not self.case.training:
            with torch.no_grad():
                return self.function(*inputs)
        out = self.function(*inputs)
        if self._upstream is None:
            self._upstream = torch.randn_like(out)
        return out, torch.autograd.grad(out, [x for x in inputs if x.requires_grad], self._upstream)

    def once(self) -> float:
        """Seconds of one call; what it allocated is released outside the timed region."""
        seconds, result = self.clock.time(self.call)
        del result
        return seconds


def input_sets(case: Case, device: str) -> list[tuple[torch.Tensor, ...]]:
    """Between 2 and 8 sets of inputs, as many as fill the caches several times over."""
    operator = OPERATORS[case.operator]
    sets: list[tuple[torch.Tensor, ...]] = []
    size = 0
    while len(sets) < 2 or (size < _ROTATION_BYTES[device] and len(sets) < _MOST_SETS):
        drawn = operator.inputs(case.dims, case.torch_dtype, 1000 * len(sets))
        size += sum(x.numel() * x.element_size() for x in drawn)
        sets.append(tuple(x.to(device).requires_grad_(case.training and x.is_floating_point()) for x in drawn))
    return sets
