"""`python -m benchmarks.run`: measure a suite on this machine, print tables, write rows."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.harness import rows
from benchmarks.harness.base import Base
from benchmarks.harness.case import Case
from benchmarks.harness.console import Bar, say, table
from benchmarks.harness.measure import limit_process, total_bytes
from benchmarks.harness.prepare import Bounds
from benchmarks.harness.rows import RESULTS, WORK, Row
from benchmarks.harness.runner import Runner
from benchmarks.rivals import implementations
from benchmarks.suites import suite

DISTURBED = 0.1
"""Cores in use by others from which on a run says so."""


@dataclass(frozen=True)
class Options:
    """What is measured, and for how long."""

    suite: Literal["smoke", "kernels", "grid", "training", "scaling", "small"] = "kernels"
    """smoke: every operator, small; small: eight queries a call; kernels: every operator at its sizes in training;
    grid: retrieval and contrast over a grid of sizes, with torch.compile; training: the loss of each scale; scaling:
    sweeps."""
    device: Literal["cpu", "cuda"] | None = None
    """A GPU if there is one, when not given."""
    filter: str = ""
    """Only cases whose title contains this: "nt_xent G=8", or as docs/PERFORMANCE.md writes it."""
    only: tuple[str, ...] = ()
    """Names of the implementations to measure; all when not given."""
    json: str | None = None
    """File of rows; benchmarks/results/<device>-<suite>.jsonl when not given, none for smoke."""
    resume: bool = True
    """Keep rows of the file that were measured at this state of the code and measure the others."""
    compile: bool = True
    """Measure implementations that compile, too (the smoke suite never does)."""
    base: str | None = None
    """Another git revision to measure in the same run, alternating with this one."""
    seconds: float | None = None
    """Longest call (default: the suite's, 2 to 6 s); slower calls get a row with status over-time."""
    memory: float | None = None
    """GiB that a call may allocate (default: half of the device's memory on a CPU, all of it on a GPU)."""


def main(options: Options) -> int:
    """Run; the exit status is 1 if an implementation of this library gave wrong numbers."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        say("--device cuda: torch finds no CUDA device")
        return 2
    chosen = suite(options.suite, device)
    if not options.compile:
        chosen = replace(chosen, compiled_groups=())
    cases = [case for case in chosen.cases if _plain(options.filter) in _plain(case.title)]
    if not cases:
        say(f"--filter {options.filter!r} matches no case of the suite; the cases are:")
        for case in chosen.cases:
            say(f"  {case.title}")
        return 2
    names = {one.name for case in cases for one in implementations(case.operator)}
    if unknown := set(options.only) - names:
        say(f"--only: expected some of {', '.join(sorted(names))}; received {', '.join(sorted(unknown))}")
        return 2
    path = _rows_path(options, device)
    old = rows.read(path) if path and options.resume else []
    # Unavailable implementations are tried again: that costs nothing.
    known = {row.key for row in old if row.status != rows.UNAVAILABLE}
    bounds = _bounds(options, device)
    state = rows.about(device)
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
        runner = Runner(chosen, device, bounds, base, known, options.only)
        with Bar(len(cases)) as bar:
            for case in cases:
                for row in runner.run(case, bar.note):
                    new.append(row)
                    if path:
                        rows.append(path, row)
                bar.step()
    busiest = max((row.others for row in new if row.others is not None), default=0.0)
    if busiest > DISTURBED:
        say(f"other processes used up to {busiest:g} cores while a case was timed: measure again on a quiet machine")
    wanted: set[Case] = set(cases)
    latest = {row.key: row for row in [*old, *new]}
    show([row for row in latest.values() if row.case in wanted])
    if path:
        rows.write(path, rows.read(path))
        say(f"rows in {path}")
    wrong = [row for row in new if row.status == rows.WRONG and row.implementation in ("native", "triton")]
    return 1 if wrong else 0


def _plain(title: str) -> str:
    """The title of a run (`G=8 B=128`) and that of the report (`G 8, B 128`) alike."""
    return title.translate(str.maketrans({"=": " ", ",": None, "`": None}))


def show(measured: list[Row]) -> None:
    """A table for each case, then the reasons of rows without a time."""
    by_case: dict[str, list[Row]] = defaultdict(list)
    for row in measured:
        by_case[row.case.title].append(row)
    for title, group in by_case.items():
        eager = next((r for r in group if r.implementation == "eager" and r.milliseconds and r.revision == WORK), None)
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
    return row.milliseconds["p50"] if row.milliseconds else float("inf")


def _name(row: Row) -> str:
    return row.implementation if row.revision == WORK else f"{row.implementation} at {row.revision}"


def _rows_path(options: Options, device: str) -> Path | None:
    if options.json is not None:
        return Path(options.json)
    if options.suite == "smoke":
        return None
    return RESULTS / f"{device}-{options.suite}.jsonl"


def _bounds(options: Options, device: str) -> Bounds:
    size = options.memory * 2**30 if options.memory else total_bytes(device) * (0.5 if device == "cpu" else 1)
    if device == "cpu":
        # Inputs, results and libraries come on top of a call's own allocations.
        limit_process(int(size) + 4 * 2**30)
    return Bounds(options.seconds or suite(options.suite, device).call_seconds, size)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.run", description=__doc__)))
