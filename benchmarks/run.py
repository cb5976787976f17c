"""`python -m benchmarks.run`: measure a suite on this machine, print tables, write rows."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks import rows
from benchmarks.base import Base
from benchmarks.console import parse, progress, say, table
from benchmarks.machine import ROOT, about
from benchmarks.memory import limit_process, total_bytes
from benchmarks.prepare import Bounds
from benchmarks.rows import Row
from benchmarks.runner import Runner
from benchmarks.suites import suite

DISTURBED = 0.1
"""Cores in use by others from which on a run says so."""


@dataclass(frozen=True)
class Options:
    """What is measured, and for how long."""

    suite: Literal["smoke", "kernels", "grid", "training", "scaling"] = "kernels"
    """smoke: does it work here; kernels: every operator; grid: retrieval and NT-Xent, each case with torch.compile;
    training: the loss of each scale; scaling: sweeps."""
    device: Literal["cpu", "cuda"] | None = None
    """Where; a GPU where there is one."""
    filter: str = ""
    """Only cases whose line contains this."""
    json: str | None = None
    """File of rows; benchmarks/results/<device>-<suite>.jsonl when not given, none for smoke."""
    resume: bool = True
    """Keep rows of the file that were measured at this state of the code and go on with the others."""
    compile: bool = True
    """Measure what is compiled first, too (the smoke suite never does)."""
    base: str | None = None
    """Another git revision to measure in the same run, alternating with this one."""
    seconds: float | None = None
    """A call may take this long (default: the suite's, 2 to 6); slower is a row that says so."""
    memory: float | None = None
    """GiB that a call may allocate (default: half of the device's memory on a CPU, all of it on a GPU)."""


def main(options: Options) -> int:
    """Run; the exit status is 1 where an implementation of this library gave wrong numbers."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        say("--device cuda: torch finds no CUDA device here")
        return 2
    chosen = suite(options.suite, device)
    if not options.compile:
        chosen = replace(chosen, compiled_groups=())
    cases = [case for case in chosen.cases if options.filter in case.title]
    if not cases:
        say(f"--filter {options.filter!r} matches no case of the suite; the cases are:")
        for case in chosen.cases:
            say(f"  {case.title}")
        return 2
    path = _rows_path(options, device)
    old = rows.read(path) if path and options.resume else []
    # What could not run may run now: it costs nothing to ask again.
    known = {row.key for row in old if row.status != rows.UNAVAILABLE}
    bounds = _bounds(options, device)
    state = about(device)
    say(f"{state['device_name']}, {state['threads']} threads, torch {state['torch']}, commit {state['commit']}")
    if path and not options.resume:
        path.unlink(missing_ok=True)
    new: list[Row] = []
    with contextlib.ExitStack() as stack:
        try:
            base = stack.enter_context(Base(options.base, device)) if options.base else None
        except ValueError as error:
            say(f"--base: {error}")
            return 2
        runner = Runner(chosen, device, bounds, base, known)
        with progress(len(cases)) as bar:
            for case in cases:
                for row in runner.run(case, bar.note):
                    new.append(row)
                    if path:
                        rows.append(path, row)
                bar.step()
    busiest = max((row.others for row in new if row.others is not None), default=0.0)
    if busiest > DISTURBED:
        say(f"other processes used up to {busiest:g} cores while a case was timed: measure again on a quiet machine")
    wanted = {case.title for case in cases}
    latest = {row.key: row for row in [*old, *new]}
    show([row for row in latest.values() if _title(row) in wanted])
    if path:
        rows.write(path, rows.read(path))
        say(f"rows in {path}")
    wrong = [row for row in new if row.status == rows.WRONG and row.implementation in ("native", "triton")]
    return 1 if wrong else 0


def show(measured: list[Row]) -> None:
    """A table for each case, then the reasons of what has no time."""
    by_case: dict[str, list[Row]] = defaultdict(list)
    for row in measured:
        by_case[_title(row)].append(row)
    for title, group in by_case.items():
        eager = next(
            (r for r in group if r.implementation == "eager" and r.milliseconds and r.revision == "work"), None
        )
        lines = [_line(row, eager) for row in sorted(group, key=_order) if row.milliseconds]
        columns = ("implementation", "p50 ms", "p20", "p80", "against eager", "peak MiB", "of the floor")
        table(f"{title}   floor {group[0].floor_milliseconds:.3g} ms", columns, lines)
        reasons: dict[str, list[str]] = defaultdict(list)
        for row in group:
            if not row.milliseconds:
                reasons[f"{row.status}: {row.reason}"].append(_name(row))
        for reason, names in reasons.items():
            say(f"  {', '.join(names)}: {reason}")


def _line(row: Row, eager: Row | None) -> tuple[str, ...]:
    assert row.milliseconds is not None
    against = "" if eager is None or eager.milliseconds is None else eager.milliseconds["p50"] / row.milliseconds["p50"]
    return (
        _name(row),
        *(f"{row.milliseconds[name]:.3g}" for name in ("p50", "p20", "p80")),
        f"{against:#.3g}×" if against else "",
        f"{(row.peak_bytes or 0) / 2**20:.1f}",
        f"{row.fraction_of_floor:.0%}",
    )


def _order(row: Row) -> float:
    assert row.milliseconds is not None or row.status != rows.MEASURED
    return row.milliseconds["p50"] if row.milliseconds else float("inf")


def _name(row: Row) -> str:
    return row.implementation if row.revision == "work" else f"{row.implementation} at {row.revision}"


def _title(row: Row) -> str:
    from benchmarks.case import Case

    return Case(row.operator, tuple(row.shape.items()), row.dtype, row.training, row.group).title


def _rows_path(options: Options, device: str) -> Path | None:
    if options.json is not None:
        return Path(options.json)
    if options.suite == "smoke":
        return None
    return ROOT / "benchmarks" / "results" / f"{device}-{options.suite}.jsonl"


def _bounds(options: Options, device: str) -> Bounds:
    size = options.memory * 2**30 if options.memory else total_bytes(device) * (0.5 if device == "cpu" else 1)
    if device == "cpu":
        # Inputs, results and libraries come on top of what a call may allocate.
        limit_process(int(size) + 4 * 2**30)
    return Bounds(options.seconds or suite(options.suite, device).call_seconds, size)


if __name__ == "__main__":
    sys.exit(main(parse(Options, __doc__ or "")))
