"""Checks an implementation against float64 and warms it up, or says why it has no time.

The library's implementations are held to the tests' budget (`anomem.testing`). Rivals may be less exact: some add a
small constant inside a logarithm by definition. They get a rounding band sixteen times as wide.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anomem.testing import assert_within_budget, gradients
from benchmarks import CACHE_GIVEN
from benchmarks.harness import rows
from benchmarks.harness.case import Case, Function, Implementation
from benchmarks.harness.measure import Timed, TookTooLong, is_out_of_memory, peak_bytes, time_limit, timed
from benchmarks.harness.rows import NoTime, Wrong
from benchmarks.operators import OPERATORS

ULPS = {True: 4.0, False: 64.0}
"""Width of the rounding band, by `Implementation.ours`."""
SLOW = 1.0
"""If the first call takes longer than this (s), its set-up cost is negligible and it counts as warm-up."""
_WHOLE = 3e9
"""Up to this many flops the float64 check is done at the case's own size."""
_ROTATION_BYTES = {"cpu": 2**27, "cuda": 2**29}
_MOST_SETS = 8


@dataclass(frozen=True)
class Bounds:
    """Limits of one call and of its preparation. A call beyond them gets a row with a reason instead of a time."""

    seconds: float
    bytes: float
    preparation: float = 60.0
    """Seconds of compiling, checking and warming up."""


@dataclass(kw_only=True)
class Ready(Timed):
    """A checked and warm implementation, of the working tree or of the base revision."""

    implementation: Implementation
    revision: str = rows.WORK
    call: Callable[[], Any] | None = None
    """The call itself; None at the base revision, which runs in its own process."""
    warm_seconds: float = 0.0
    peak_bytes: int
    checked: dict[str, int]
    compile_seconds: float | None = None
    """First call minus a warm one, of implementations that compile."""


class Subject:
    """One implementation of one case with several sets of random inputs in rotation, so that no call finds its inputs
    in a cache because the previous call read them.

    Args:
        case: what is computed.
        function: computes it.
        device: "cpu" or "cuda".
        sets: of inputs, from `input_sets`.
    """

    def __init__(self, case: Case, function: Function, device: str, sets: list[tuple[Tensor, ...]]) -> None:
        self.case = case
        self.function = function
        self.device = device
        self.sets = sets
        self._turn = 0
        self._upstream: Tensor | None = None

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
        """Seconds of one call; its result is released outside the timed region."""
        seconds, result = timed(self.call, self.device)
        del result
        return seconds


def input_sets(case: Case, device: str) -> list[tuple[Tensor, ...]]:
    """Between 2 and 8 sets of inputs, as many as fill the caches several times over."""
    operator = OPERATORS[case.operator]
    sets: list[tuple[Tensor, ...]] = []
    size = 0
    while len(sets) < 2 or (size < _ROTATION_BYTES[device] and len(sets) < _MOST_SETS):
        inputs = operator.inputs(case.dims, case.torch_dtype, 1000 * len(sets))
        size += sum(x.numel() * x.element_size() for x in inputs)
        sets.append(tuple(x.to(device).requires_grad_(case.training and x.is_floating_point()) for x in inputs))
    return sets


def checked_at(case: Case, compiles: bool) -> Case:
    """The case at the size of its check; a function compiled for one size is checked at that size."""
    operator = OPERATORS[case.operator]
    if operator.least_work(case).flops <= (20 * _WHOLE if compiles else _WHOLE):
        return case
    return Case(case.operator, tuple(operator.smaller(case.dims).items()), case.dtype, case.training, case.group)


class Truth:
    """The reference's results for a case, in its dtype and in float64, computed once for all implementations.

    Args:
        case: at the size of the check.
        device: "cpu" or "cuda".
    """

    def __init__(self, case: Case, device: str) -> None:
        operator = OPERATORS[case.operator]
        self.case = case
        self.inputs = tuple(x.to(device) for x in operator.inputs(case.dims, case.torch_dtype, 7))
        reference = operator.ours("reference")
        self.plain = self._results(reference, self.inputs)
        self.exact = self._results(reference, tuple(x.double() if x.is_floating_point() else x for x in self.inputs))

    def _results(self, function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        if self.case.training:
            return gradients(function, inputs)
        with torch.no_grad():
            return [function(*inputs)]

    def check(self, implementation: Implementation, function: Function) -> None:
        """Compare a function's result and gradients with float64.

        Raises:
            Wrong: which result is off, by how much.
        """
        results = self._results(function, self.inputs)
        for i, (actual, plain, exact) in enumerate(zip(results, self.plain, self.exact, strict=True)):
            name = f"gradient {i}" if i else "result"
            try:
                assert_within_budget(actual, plain.to(actual.dtype), exact, name, ULPS[implementation.ours])
            except AssertionError as error:
                raise Wrong(str(error)) from None


class Bench:
    """Prepares the implementations of one case; inputs and float64 results are made once for all of them.

    Args:
        case: what is computed.
        device: "cpu" or "cuda".
        bounds: of one call.
    """

    def __init__(self, case: Case, device: str, bounds: Bounds) -> None:
        self.case = case
        self.device = device
        self.bounds = bounds
        self._truth = functools.cache(lambda at: Truth(at, device))
        self._inputs = functools.cache(lambda: input_sets(case, device))

    def ready(self, implementation: Implementation) -> Ready:
        """Check an implementation and warm it up.

        Raises:
            NoTime: it is unavailable, wrong, fails, or exceeds a bound.
        """
        self.fits(implementation)
        limit = self.bounds.preparation
        with reasons():
            function = implementation.build(self.case, self.device)
            if implementation.compiles:
                warm_up_compiler(self.device)
            at = checked_at(self.case, implementation.compiles)
            truth, sets = self._truth(at), self._inputs()
            try:
                with time_limit(limit):
                    # A function built for the case's batch is built again for the size of the check.
                    candidate = function if at is self.case else implementation.build(at, self.device)
                    begun = time.perf_counter()
                    truth.check(implementation, candidate)
                    checking = time.perf_counter() - begun
                    subject = Subject(self.case, function, self.device, sets)
                    first = seconds = subject.once()  # builds, allocates and plans
                    if implementation.compiles or first <= min(SLOW, self.bounds.seconds):
                        seconds = subject.once()
            except TookTooLong:
                what = "compiling" if implementation.compiles else "the check and the first calls"
                raise NoTime(rows.OVER_TIME, f"{what} took longer than {limit:g} s") from None
            if seconds > self.bounds.seconds:
                reason = f"over {self.bounds.seconds:g} s: one call took {seconds:.1f} s"
                raise NoTime(rows.OVER_TIME, reason, seconds)
            peak = peak_bytes(subject.call, self.device)
        compiling = (checking if at is self.case else first) - seconds
        return Ready(
            implementation=implementation,
            once=subject.once,
            call=subject.call,
            warm_seconds=seconds,
            peak_bytes=peak,
            checked=at.dims,
            compile_seconds=max(0.0, compiling) if implementation.compiles else None,
        )

    def fits(self, implementation: Implementation) -> None:
        """Refuse what would not fit before it is started.

        Raises:
            NoTime: the estimate of its memory exceeds the bound.
        """
        case = self.case
        operator = OPERATORS[case.operator]
        elements = (implementation.elements or operator.stored)(case.dims)
        needed = implementation.stored * elements * max(4, case.torch_dtype.itemsize)
        if not case.training:
            needed /= 2
        if needed > self.bounds.bytes:
            reason = f"OOM at {gib(self.bounds.bytes)}: needs about {gib(needed)}, an estimate"
            raise NoTime(rows.OUT_OF_MEMORY, reason)


@functools.cache
def warm_up_compiler(device: str) -> None:
    """Do before the first timed compilation what a process does once: precompiled headers, the probe of the processor.

    The time to compile is a figure of its own, so a run starts with an empty cache of compiled code, unless
    `TORCHINDUCTOR_CACHE_DIR` is set.

    Args:
        device: "cpu" or "cuda".
    """
    import torch._inductor.config as inductor

    if not CACHE_GIVEN:
        folder = tempfile.mkdtemp(prefix="anomem-inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if device == "cpu":
        # Each process of a pool would import torch, which takes longer than compiling one case.
        inductor.compile_threads = 1
    x = torch.ones(2, 64, 64, device=device, requires_grad=True)
    torch.autograd.grad(torch.compile(lambda x: (x @ x.mT).softmax(-1).sum(), dynamic=False)(x), x)


@contextmanager
def reasons() -> Iterator[None]:
    """Turn any exception of an implementation into `NoTime`, so that the run goes on and the row has the reason."""
    try:
        yield
    except NoTime:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise NoTime(rows.OUT_OF_MEMORY, f"OOM: {first_line(error)}") from None
        raise NoTime(rows.FAILED, f"{type(error).__name__}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of a message, short enough for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def gib(size: float) -> str:
    """Bytes in GiB."""
    number = size / 2**30
    return f"{number:.0f} GiB" if number >= 100 else f"{number:.3g} GiB"
