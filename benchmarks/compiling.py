"""Compilers in the harness: settings that keep them out of the timings, and a limit on how long one may take.

What a compiler does before its first result has a figure of its own in the row. For that figure to mean something, a
run starts with an empty cache of compiled code (`TORCHINDUCTOR_CACHE_DIR`, where set, keeps one between runs), and what
a process pays once (precompiled headers, the probe of the instruction set) is paid before the first case.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks import CACHE_GIVEN


class TookTooLong(BaseException):
    """A limit has passed. No `Exception`: compilers catch those, and would go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt Python code, and child processes it waits for, after this time; C++ code first returns.

    Args:
        seconds: of wall time.

    Raises:
        TookTooLong: from wherever the block is.
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


@functools.cache
def warm_up(device: str) -> None:
    """Once in a process, before the first compilation.

    Args:
        device: "cpu" or "cuda".
    """
    import torch._inductor.config as inductor

    if not CACHE_GIVEN:
        folder = tempfile.mkdtemp(prefix="anomem-inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if device == "cpu":
        # A pool of compiling processes imports torch in each of them: longer than what one case compiles.
        inductor.compile_threads = 1
    x = torch.ones(2, 64, 64, device=device, requires_grad=True)
    torch.autograd.grad(torch.compile(lambda x: (x @ x.mT).softmax(-1).sum(), dynamic=False)(x), x)
