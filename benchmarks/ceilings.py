"""The two ceilings of a device, measured in the run that uses them: a large matrix product and a large copy."""

from __future__ import annotations

from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.case import Case
from benchmarks.operators import OPERATORS
from benchmarks.timing import Clock


class Ceilings:
    """Measures on first use and remembers.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.clock = Clock(device)
        self._rates: dict[str, float] = {}

    def product(self, dtype: torch.dtype) -> float:
        """Flop/s of a square matrix product: 8192 on a GPU; on a CPU 2048, by the faster of torch's two libraries."""
        name = f"product {dtype}"
        if name not in self._rates:
            size = 8192 if self.device == "cuda" else 2048
            left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(left)
            seconds = self._seconds(lambda: torch.mm(left, right, out=out))
            if self.device == "cpu" and torch.backends.mkldnn.is_available():
                # Where torch.mm is MKL's, oneDNN's product can be more than twice as fast: on AMD it is.
                blocked = left.to_mkldnn(), right.to_mkldnn()
                seconds = min(seconds, self._seconds(lambda: F.linear(*blocked)))
            self._rates[name] = 2 * size**3 / seconds
        return self._rates[name]

    def copy(self) -> float:
        """Byte/s, read and written, of a copy of 1 GiB on a GPU, 256 MiB on a CPU: far beyond any cache."""
        if "copy" not in self._rates:
            size = 2**30 if self.device == "cuda" else 2**28
            source = torch.randn(size // 4, device=self.device)
            target = torch.zeros_like(source)
            self._rates["copy"] = 2 * size / self._seconds(lambda: target.copy_(source))
        return self._rates["copy"]

    def _seconds(self, call) -> float:
        for _ in range(2):
            self.clock.time(call)
        return median(self.clock.time(call)[0] for _ in range(7))

    def for_case(self, case: Case) -> dict[str, float]:
        """The ceilings that a row of this case quotes."""
        return {"product_flops": self.product(case.torch_dtype), "copy_bytes": self.copy()}

    def floor_seconds(self, case: Case) -> float:
        """The longer of the times that the case's least flops and least bytes take at the ceilings."""
        work = OPERATORS[case.operator].least_work(case)
        return max(work.flops / self.product(case.torch_dtype), work.bytes / self.copy())
