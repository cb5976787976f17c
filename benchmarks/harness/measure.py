"""Seconds, peak memory and limits of any call, and the two ceilings of a device.

Time on a CPU: the wall clock; with one thread the processor time of the process, which other processes disturb less.
Time on a GPU: two CUDA events, after the L2 cache was overwritten, behind a delay in
which the host queues the whole call; so launches are not timed.

Memory: the largest amount allocated during a call beyond what was allocated before it. On CUDA the caching allocator
keeps that figure. On a CPU the profiler reports every allocation and release of torch's CPU allocator; the largest
running sum is exact and repeatable, unlike the resident size of a process. The most of anomem's own memory (scratch and
large results) that was in use at once is added. Memory that another library takes from the system by itself (packed
panels of the BLAS library, stack arrays) is not seen.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import Case
from benchmarks.operators import OPERATORS

_LAUNCH_CYCLES = 2_000_000  # about a millisecond


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of a call, and its result.

    Args:
        call: warm.
        device: "cpu" or "cuda".
    """
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        result = call()
        return clock() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()
    torch.cuda._sleep(_LAUNCH_CYCLES)
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, result


@functools.cache
def _cache_filler() -> Tensor:
    """Bytes that fill the L2 cache four times."""
    return torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")


@dataclass(kw_only=True)
class Timed:
    """A call that takes turns with others."""

    once: Callable[[], float]
    """Makes one call; its seconds."""
    seconds: list[float] = field(default_factory=list)
    """Of the calls so far."""

    def milliseconds(self) -> dict[str, float]:
        """p20, p50 and p80 of the calls so far."""
        times = torch.tensor(self.seconds, dtype=torch.float64) * 1e3
        quantiles = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        return dict(zip(("p20", "p50", "p80"), quantiles.tolist(), strict=True))


T = TypeVar("T", bound=Timed)


def take_turns(calls: Sequence[T], enough: Callable[[T], bool], most: int) -> None:
    """Round after round, call each once, so that a disturbance of the machine reaches all of them.

    Args:
        calls: warm.
        enough: whether a call needs no more repeats; asked before each of its turns.
        most: rounds.
    """
    for _ in range(most):
        for call in calls:
            if not enough(call):
                call.seconds.append(call.once())


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Peak memory of one call; its result is alive at the end.

    Args:
        call: the computation; anything it caches should be warm. On a CPU it may say where its phases end.
        device: "cpu" or "cuda".
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak
    _scratch_peak()
    _phases.clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    end_phase()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    running = peak = 0
    phases = iter(_phases)
    end, scratch = next(phases)
    for event in sorted(events, key=lambda event: event.start_ns()):
        while event.start_ns() > end:
            end, scratch = next(phases, (sys.maxsize, 0))
            peak = max(peak, running + scratch)
        running += event.nbytes()
        peak = max(peak, running + scratch)
    return peak


def end_phase() -> None:
    """Within a call of `peak_bytes`: the peaks of torch's memory and of the kernels' own are added for each phase."""
    _phases.append((time.time_ns(), _scratch_peak()))


_phases: list[tuple[int, int]] = []
"""When a phase ended, on the profiler's clock, and the peak of the kernels' own memory in it."""


def _scratch_peak() -> int:
    """Most bytes of the native kernels' own memory in use since the last call; 0 without their library."""
    native = importlib.import_module("anomem.ops.native")
    if native.obstacle("cpu") is not None:
        return 0
    return int(torch.ops.anomem.native_scratch_peak(torch.empty(0)))


def product_flops(call: Callable[[], Any]) -> int:
    """Of the products and convolutions of a call: as torch counts them, and as the library makes its convolutions."""
    convolutions = importlib.import_module("anomem.ops.conv3x3")  # registers them

    def products(x: Tensor, channels_out: int) -> int:
        batch, channels, height, width = x.shape
        if x.dtype == torch.bfloat16 and convolutions.makes_forward(x.dtype):  # directly
            return 9 * batch * height * width * channels * channels_out
        return 16 * batch * ((height + 1) // 2) * ((width + 1) // 2) * channels * channels_out  # for 2×2 pixels

    def of_map(x: Tensor, *_: Any, out_val: Tensor) -> int:
        return 2 * products(x, out_val.shape[1])

    def of_weight(x: Tensor, grad: Tensor, out_val: Tensor) -> int:
        return 2 * products(x, grad.shape[1])

    for one in (of_map, of_weight):
        vars(one)["_get_raw"] = True  # takes tensors, not their shapes
    operators = torch.ops.anomem
    known = {operators.native_conv3x3: of_map, operators.native_conv3x3_weight: of_weight}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    return int(counter.get_total_flops())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return re.search(r"can't allocate memory|not enough memory|out of memory|bad_alloc", str(error)) is not None


def total_bytes(device: str) -> int:
    """Memory of the device."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_process(limit_bytes: int) -> None:
    """Make allocations of this process beyond a limit fail instead of exhausting the machine; Linux only.

    RLIMIT_DATA counts private anonymous memory, which is where tensors live.
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


class TookTooLong(BaseException):
    """A time limit has passed. Not an `Exception`: compilers catch those and continue."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt Python code, and child processes it waits for, after this time; C++ code first returns.

    Args:
        seconds: of wall time.

    Raises:
        TookTooLong: from anywhere in the block.
    """

    def interrupt(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Ceilings:
    """Rates of a large matrix product and of a large copy, measured at first use.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
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
                # torch.mm calls MKL; on AMD oneDNN's product was more than twice as fast.
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

    def for_case(self, case: Case) -> dict[str, float]:
        """The ceilings that a row of this case quotes."""
        return {"product_flops": self.product(case.torch_dtype), "copy_bytes": self.copy()}

    def floor_seconds(self, case: Case) -> float:
        """Time of the case's least flops or of its least bytes at the ceilings, whichever is longer."""
        work = OPERATORS[case.operator].least_work(case)
        return max(work.flops / self.product(case.torch_dtype), work.bytes / self.copy())

    def _seconds(self, call: Callable[[], Any]) -> float:
        for _ in range(2):
            timed(call, self.device)
        return median(timed(call, self.device)[0] for _ in range(7))
