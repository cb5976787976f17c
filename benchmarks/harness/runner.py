"""Measures the cases of a suite: all implementations take turns in one process; rows from the results."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator

import torch

from benchmarks.harness import rows
from benchmarks.harness.base import Base
from benchmarks.harness.case import Case, Implementation
from benchmarks.harness.measure import Ceilings, take_turns
from benchmarks.harness.prepare import Bench, Bounds, Ready
from benchmarks.harness.rows import WORK, NoTime, Row, row_for
from benchmarks.operators import OPERATORS
from benchmarks.rivals import implementations
from benchmarks.suites import Suite


class Runner:
    """Runs the cases of a suite on one device.

    Args:
        suite: name, cases and budgets.
        device: "cpu" or "cuda".
        bounds: of one call.
        base: another revision to measure beside the working tree, or None.
        known: keys of rows that need not be measured again.
        only: names of the implementations to measure; all where empty.
    """

    def __init__(
        self,
        suite: Suite,
        device: str,
        bounds: Bounds,
        base: Base | None,
        known: set[str],
        only: Collection[str] = (),
    ) -> None:
        self.suite = suite
        self.device = device
        self.bounds = bounds
        self.base = base
        self.known = known
        self.only = only
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
        ready: list[Ready] = []
        for implementation in implementations(case.operator):
            if self.only and implementation.name not in self.only:
                continue
            for revision in self._revisions(implementation):
                row = self._row(case, implementation.name, revision, rows.MEASURED)
                if row.key in self.known:
                    continue
                note(f"{case.title}: {implementation.name}{'' if revision == WORK else f' at {revision}'}, check")
                try:
                    if revision == WORK:
                        ready.append(self._ready(bench, implementation))
                    else:
                        assert self.base is not None
                        ready.append(self.base.ready(case, implementation, self.bounds))
                except NoTime as none:
                    if none.seconds is not None and revision == WORK:
                        self._learn(case, implementation, none.seconds)
                    row.status, row.reason = none.status, none.reason
                    yield row
        note(f"{case.title}: timing")
        with rows.Others() as others:
            take_turns(ready, lambda one: self.suite.enough(one.seconds), self.suite.most_repeats)
        for one in ready:
            # The base revision's process would count as another.
            yield self._measured(case, one, None if self.base else others.cores)
        del bench, ready
        gc.collect()

    def _revisions(self, implementation: Implementation) -> list[str]:
        return [WORK, self.base.revision] if self.base and implementation.ours else [WORK]

    def _ready(self, bench: Bench, implementation: Implementation) -> Ready:
        if implementation.compiles and not self.suite.compiles_for(bench.case):
            raise NoTime(rows.UNAVAILABLE, "left out where compiling would take longer than measuring")
        bench.fits(implementation)
        self._expect(bench.case, implementation)
        return bench.ready(implementation)

    def _expect(self, case: Case, implementation: Implementation) -> None:
        """Refuse before it is started what earlier cases show to be far over the bound."""
        rate = self._rates.get(_series(case, implementation))
        seconds = self.ceilings.floor_seconds(case) if rate is None else rate * self._cost(case, implementation)
        if seconds > 1.5 * self.bounds.seconds:
            source = "the floor alone" if rate is None else "an earlier case's rate"
            figure = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
            raise NoTime(rows.OVER_TIME, f"over {self.bounds.seconds:g} s: {source} makes it {figure} s")

    def _learn(self, case: Case, implementation: Implementation, seconds: float) -> None:
        """Remember an implementation's latest rate, once its calls are not mostly overhead."""
        series = _series(case, implementation)
        if seconds > 0.1 * self.bounds.seconds or series in self._rates:
            self._rates[series] = seconds / self._cost(case, implementation)

    def _cost(self, case: Case, implementation: Implementation) -> float:
        """The quantity that an implementation's time is proportional to: its own intermediate, else the floor."""
        if implementation.elements is not None:
            return float(implementation.elements(case.dims))
        return self.ceilings.floor_seconds(case)

    def _measured(self, case: Case, ready: Ready, others: float | None) -> Row:
        row = self._row(case, ready.implementation.name, ready.revision, rows.MEASURED)
        row.milliseconds = ready.milliseconds()
        row.repeats = len(ready.seconds)
        row.peak_bytes, row.checked, row.compile_seconds = ready.peak_bytes, ready.checked, ready.compile_seconds
        row.others = others
        assert row.floor_milliseconds is not None
        row.fraction_of_floor = row.floor_milliseconds / row.milliseconds["p50"]
        if ready.revision == WORK:
            self._learn(case, ready.implementation, row.milliseconds["p50"] / 1e3)
        return row

    def _row(self, case: Case, name: str, revision: str, status: str) -> Row:
        row = row_for(self.suite.name, case, name, revision, status)
        work = OPERATORS[case.operator].least_work(case)
        row.flops, row.bytes, row.exponentials = work.flops, work.bytes, work.exponentials
        row.floor_milliseconds = self.ceilings.floor_seconds(case) * 1e3
        row.ceilings = self.ceilings.for_case(case)
        row.about = rows.about(self.device)
        if self.base and revision == self.base.revision:
            row.about = {**row.about, "commit": self.base.commit, "dirty": False}
        return row


def _series(case: Case, implementation: Implementation) -> tuple[str, str, bool, str]:
    return case.operator, case.dtype, case.training, implementation.name
