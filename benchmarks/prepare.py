"""From an implementation to something that can be timed, or to the reason why it cannot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks import rows
from benchmarks.case import Case, Implementation, Unavailable
from benchmarks.check import Truth, Wrong, checked_at
from benchmarks.compiling import TookTooLong, time_limit, warm_up
from benchmarks.memory import is_out_of_memory, peak_bytes
from benchmarks.operators import OPERATORS
from benchmarks.timing import Subject, input_sets

SLOW = 1.0
"""Seconds of a first call next to which what it allocates and plans is nothing: it is the warm-up."""


@dataclass(frozen=True)
class Bounds:
    """What one call may take, and what comes before it. Beyond it the row says so instead of a time."""

    seconds: float
    bytes: float
    preparation: float = 60.0
    """Seconds of compiling, checking and warming up."""


class NoTime(Exception):
    """Why a case has no time, as a row's status and reason.

    Args:
        status: one of `benchmarks.rows`.
        reason: in words.
        seconds: of the one call that was made, where it was over the bound.
    """

    def __init__(self, status: str, reason: str, seconds: float | None = None) -> None:
        self.status = status
        self.reason = reason
        self.seconds = seconds
        super().__init__(f"{status}: {reason}")


@dataclass
class Ready:
    """A checked and warm implementation."""

    implementation: Implementation
    subject: Subject
    warm_seconds: float
    peak_bytes: int
    checked: dict[str, int]
    compile_seconds: float | None
    """What the first call took beyond a warm one, of implementations that compile."""


class Bench:
    """Prepares the implementations of one case; inputs and float64 results are made once for all of them.

    Args:
        case: what is computed.
        device: "cpu" or "cuda".
        bounds: what one call may take.
    """

    def __init__(self, case: Case, device: str, bounds: Bounds) -> None:
        self.case = case
        self.device = device
        self.bounds = bounds
        self._truths: dict[Case, Truth] = {}
        self._sets: list[tuple[torch.Tensor, ...]] | None = None

    def ready(self, implementation: Implementation) -> Ready:
        """Check an implementation and warm it up.

        Raises:
            NoTime: it is unavailable, wrong, fails, or passes a bound.
        """
        self.fits(implementation)
        limit = self.bounds.preparation
        with reasons():
            function = implementation.build(self.case, self.device)
            if implementation.compiles:
                warm_up(self.device)
            at = checked_at(self.case, implementation.compiles)
            truth, sets = self._truth(at), self._inputs()
            try:
                with time_limit(limit):
                    # What is built for a batch of the case's own size is built again for the size of the check.
                    candidate = function if at is self.case else implementation.build(at, self.device)
                    begun = time.perf_counter()
                    truth.check(implementation, candidate)
                    checking = time.perf_counter() - begun
                    subject = Subject(self.case, function, self.device, sets)
                    calls: list[float] = []
                    while len(calls) < 2:  # the first call builds, allocates and plans
                        calls.append(subject.once())
                        if calls[-1] > min(SLOW, self.bounds.seconds) and not implementation.compiles:
                            break
            except TookTooLong:
                what = "compiling" if implementation.compiles else "the check and the first calls"
                raise NoTime(rows.OVER_TIME, f"{what} took longer than {limit:g} s") from None
            seconds = calls[-1]
            if seconds > self.bounds.seconds:
                reason = f"over {self.bounds.seconds:g} s: one call took {seconds:.1f} s"
                raise NoTime(rows.OVER_TIME, reason, seconds)
            peak = peak_bytes(subject.call, self.device)
        first = checking if at is self.case else calls[0]
        compiled = max(0.0, first - seconds) if implementation.compiles else None
        return Ready(implementation, subject, seconds, peak, at.dims, compiled)

    def fits(self, implementation: Implementation) -> None:
        """Not to start what would not fit.

        Raises:
            NoTime: the estimate of its memory is over the bound.
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

    def _truth(self, case: Case) -> Truth:
        if case not in self._truths:
            self._truths[case] = Truth(case, self.device)
        return self._truths[case]

    def _inputs(self) -> list[tuple[torch.Tensor, ...]]:
        if self._sets is None:
            self._sets = input_sets(self.case, self.device)
        return self._sets


@contextmanager
def reasons() -> Iterator[None]:
    """Turn what an implementation raises into `NoTime`: the table goes on, and says what happened."""
    try:
        yield
    except NoTime:
        raise
    except Unavailable as error:
        raise NoTime(rows.UNAVAILABLE, str(error)) from None
    except Wrong as error:
        raise NoTime(rows.WRONG, str(error)) from None
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
