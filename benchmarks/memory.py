"""Peak memory of a call as a difference: what is allocated while it runs beyond what was allocated before.

On CUDA the caching allocator keeps the figure. On a CPU the profiler reports every allocation and release of torch's
CPU allocator with its size, and the largest running sum is exact and the same in every run, which the resident size of
a process is not. It does not see memory that a library takes from the system by itself (packed panels of the BLAS
library, stack arrays).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Peak of one call; what it returns is alive at the end.

    Args:
        call: the computation; anything it caches should be warm.
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    running = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocation that failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return re.search(r"can't allocate memory|not enough memory|out of memory|bad_alloc", str(error)) is not None


def limit_process(limit_bytes: int) -> None:
    """Let allocations of this process beyond a limit fail instead of taking the machine down; Linux only.

    RLIMIT_DATA counts private anonymous memory, which is where tensors live.
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def total_bytes(device: str) -> int:
    """Memory of the device."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
