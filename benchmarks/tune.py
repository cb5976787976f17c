"""`python -m benchmarks.tune`: time every candidate tile of the Triton kernels, and their schemes, on this GPU.

Writes rows, prints a table for each launch, an order for `kernels/tiles.py`, and answers to what could not be decided
without a GPU. A tile whose numbers are not within the tests' budget gets no time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.harness import rows
from benchmarks.harness.case import Case
from benchmarks.harness.console import Bar, say
from benchmarks.harness.rows import RESULTS, Row, about
from benchmarks.tiles import proposal, schemes, sweep


@dataclass(frozen=True)
class Options:
    """What is timed."""

    filter: str = ""
    """Only cases whose line contains this."""
    json: str | None = None
    """File of rows, benchmarks/results/cuda-tiles.jsonl when not given; rows of an earlier run are replaced."""
    neighbours: bool = True
    """Try the neighbours of the table's tiles, too: about five times as many, and each has to be compiled."""
    check: bool = True
    """Hold each tile's numbers to float64; wrong ones get no time."""


def main(options: Options) -> int:
    """Run; 1 where a tile gave wrong numbers, 2 where there is nothing to time."""
    reason = obstacle()
    if reason is not None:
        say(reason)
        return 2
    state = about("cuda")
    say(f"{state['device_name']}, torch {state['torch']}, Triton {state['triton']}, commit {state['commit']}")
    path = Path(options.json) if options.json else RESULTS / "cuda-tiles.jsonl"
    parts = [part for part in plan("cuda", options) if options.filter in part[0].title]
    if not parts:
        say(f"--filter {options.filter!r} matches no case; the cases are:")
        for one, _ in plan("cuda", options):
            say(f"  {one.title}")
        return 2
    path.unlink(missing_ok=True)
    measured = list(run(parts, path))
    proposal.show(measured)
    say(f"rows in {path}")
    return 1 if any(row.status == rows.WRONG for row in measured) else 0


def obstacle() -> str | None:
    """Why nothing can be timed here, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here: tiles are timed on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with the CUDA builds of torch)"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it"
    return None


Part = tuple[Case, Callable[[Case], Iterator[Row]]]


def plan(device: str, options: Options) -> list[Part]:
    """What is measured and by whom, the quick answers first."""
    import triton.testing

    tiles = sweep.Sweep(device, options.neighbours, options.check)
    percentiles = {"quantiles": (0.2, 0.5, 0.8)}
    compared = schemes.Schemes(
        device, tiles.tuning.measure, functools.partial(triton.testing.do_bench_cudagraph, rep=20, **percentiles)
    )
    return [
        *((one, compared.compare) for one in schemes.cases()),
        *((one, compared.scratches) for one in schemes.scratch_cases()),
        *((one, tiles.rows) for one in sweep.cases()),
    ]


def run(parts: list[Part], path: Path) -> Iterator[Row]:
    """Measure, and keep each row as soon as it is there."""
    with Bar(len(parts)) as bar:
        for one, measure in parts:
            bar.note(one.title)
            for row in measure(one):
                rows.append(path, row)
                yield row
            bar.step()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
