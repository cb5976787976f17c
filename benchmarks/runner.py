"""Measures cases: interleaved repeats of all implementations in one process, and rows from the results."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks import machine, rows
from benchmarks.base import Base
from benchmarks.case import Case, Implementation
from benchmarks.ceilings import Ceilings
from benchmarks.operators import OPERATORS
from benchmarks.prepare import Bench, Bounds, NoTime, Ready
from benchmarks.rivals import implementations
from benchmarks.rows import Row, row_for
from benchmarks.suites import Suite

WORK = "work"
"""Revision of the working tree in rows."""


@dataclass
class Entry:
    """An implementation that is timed: here, or at the base revision in its own process."""

    implementation: Implementation
    revision: str
    once: Callable[[], float]
    peak_bytes: int
    checked: dict[str, int]
    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)


class Runner:
    """Runs the cases of a suite on one device.

    Args:
        suite: name, cases and budgets.
        device: "cpu" or "cuda".
        bounds: what one call may take.
        base: another revision to measure beside the working tree, or None.
        known: keys of rows that need not be measured again.
    """

    def __init__(self, suite: Suite, device: str, bounds: Bounds, base: Base | None, known: set[str]) -> None:
        self.suite = suite
        self.device = device
        self.bounds = bounds
        self.base = base
        self.known = known
        self.ceilings = Ceilings(device)
        self._rates: dict[tuple[str, str, bool, str], float] = {}

    def run(self, case: Case, note: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
        """Measure a case.

        Args:
            case: of the suite.
            note: called with what is being done.

        Yields:
            A row for each implementation and revision that is not known yet.
        """
        torch.compiler.reset()
        bench = Bench(case, self.device, self.bounds)
        entries: list[Entry] = []
        for implementation in implementations(case.operator):
            if not self._is_known(case, implementation.name, WORK):
                note(f"{case.title}: {implementation.name}, check and warm-up")
                try:
                    if implementation.compiles and not self.suite.compiles_for(case):
                        reason = "left out where compiling would take longer than measuring"
                        raise NoTime(rows.UNAVAILABLE, reason)
                    bench.fits(implementation)
                    self._expect(case, implementation)
                    ready = bench.ready(implementation)
                    entries.append(self._entry(ready))
                except NoTime as none:
                    if none.seconds is not None:
                        self._learn(case, implementation, none.seconds)
                    row = row_for(self.suite.name, case, implementation.name, WORK, none.status)
                    yield self._finish(case, row, none)
            if self.base and implementation.ours and not self._is_known(case, implementation.name, self.base.revision):
                note(f"{case.title}: {implementation.name} at {self.base.revision}")
                try:
                    entries.append(self._base_entry(case, implementation))
                except NoTime as none:
                    row = row_for(self.suite.name, case, implementation.name, self.base.revision, none.status)
                    yield self._finish(case, row, none)
        note(f"{case.title}: timing")
        with machine.Others() as others:
            self._time(entries)
        for entry in entries:
            # The base revision's process would count as another.
            yield self._measured(case, entry, None if self.base else others.cores)
        del bench, entries
        gc.collect()

    def _time(self, entries: list[Entry]) -> None:
        """Round after round, each implementation once, until each has its repeats."""
        for _ in range(self.suite.most_repeats):
            for entry in entries:
                spent = sum(entry.seconds)
                enough = len(entry.seconds) >= self.suite.least_repeats or spent > self.suite.most_seconds
                if not (enough and spent > self.suite.seconds):
                    entry.seconds.append(entry.once())

    def _expect(self, case: Case, implementation: Implementation) -> None:
        """Not to start what earlier cases show to be far over the bound."""
        rate = self._rates.get(_series(case, implementation))
        seconds = self.ceilings.floor_seconds(case) if rate is None else rate * self._cost(case, implementation)
        if seconds > 1.5 * self.bounds.seconds:
            source = "the floor alone" if rate is None else "an earlier case's rate"
            told = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
            raise NoTime(rows.OVER_TIME, f"over {self.bounds.seconds:g} s: {source} makes it {told} s")

    def _learn(self, case: Case, implementation: Implementation, seconds: float) -> None:
        """Remember an implementation's latest rate, once its calls are not mostly overhead."""
        series = _series(case, implementation)
        if seconds > 0.1 * self.bounds.seconds or series in self._rates:
            self._rates[series] = seconds / self._cost(case, implementation)

    def _cost(self, case: Case, implementation: Implementation) -> float:
        """What the time of an implementation grows with: its own intermediate, else the floor."""
        if implementation.elements is not None:
            return float(implementation.elements(case.dims))
        return self.ceilings.floor_seconds(case)

    def _entry(self, ready: Ready) -> Entry:
        once, peak, checked = ready.subject.once, ready.peak_bytes, ready.checked
        return Entry(ready.implementation, WORK, once, peak, checked, ready.compile_seconds)

    def _base_entry(self, case: Case, implementation: Implementation) -> Entry:
        assert self.base is not None
        base, name = self.base, implementation.name
        answer = base.ready(case, name, self.bounds)
        return Entry(implementation, base.revision, lambda: base.once(name), answer["peak_bytes"], answer["checked"])

    def _measured(self, case: Case, entry: Entry, others: float | None) -> Row:
        row = row_for(self.suite.name, case, entry.implementation.name, entry.revision, rows.MEASURED)
        times = torch.tensor(entry.seconds, dtype=torch.float64) * 1e3
        p20, p50, p80 = (float(q) for q in torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)))
        row.milliseconds = {"p20": p20, "p50": p50, "p80": p80}
        row.repeats = len(entry.seconds)
        row.peak_bytes = entry.peak_bytes
        row.checked = entry.checked
        row.compile_seconds = entry.compile_seconds
        row.others = others
        floor = self.ceilings.floor_seconds(case) * 1e3
        row.fraction_of_floor = floor / p50
        if entry.revision == WORK:
            self._learn(case, entry.implementation, p50 / 1e3)
        return self._finish(case, row)

    def _finish(self, case: Case, row: Row, none: NoTime | None = None) -> Row:
        work = OPERATORS[case.operator].least_work(case)
        row.reason = none.reason if none else None
        row.flops, row.bytes, row.exponentials = work.flops, work.bytes, work.exponentials
        row.floor_milliseconds = self.ceilings.floor_seconds(case) * 1e3
        row.ceilings = self.ceilings.for_case(case)
        row.about = machine.about(self.device)
        if self.base and row.revision == self.base.revision:
            row.about = {**row.about, "commit": self.base.commit, "dirty": False}
        return row

    def _is_known(self, case: Case, name: str, revision: str) -> bool:
        row = row_for(self.suite.name, case, name, revision, rows.MEASURED)
        return self._finish(case, row).key in self.known


def _series(case: Case, implementation: Implementation) -> tuple[str, str, bool, str]:
    return case.operator, case.dtype, case.training, implementation.name
