"""`pytest benchmarks/`: the harness as pytest-benchmark sees it, at the sizes of the smoke suite.

It is for comparing runs with pytest-benchmark's own tools (`--benchmark-save`, `--benchmark-compare`) and for CI; rows,
tables and pictures come from `python -m benchmarks.run`. Each implementation of each operator is one test, checked
against float64 before it is timed: a wrong one fails, an unavailable one is skipped with its reason.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.harness import rows
from benchmarks.harness.case import Case, Implementation
from benchmarks.harness.prepare import Bench, Bounds
from benchmarks.harness.rows import NoTime
from benchmarks.rivals import implementations
from benchmarks.suites import suite

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'anomem[dev]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOKE = suite("smoke", DEVICE)
BOUNDS = Bounds(seconds=5.0, bytes=2 * 2**30)
PAIRS = [
    pytest.param(case, implementation, id=f"{case.operator}-{implementation.name}")
    for case in SMOKE.cases
    for implementation in implementations(case.operator)
    if SMOKE.compiles_for(case) or not implementation.compiles
]


@cache
def bench(case: Case) -> Bench:
    """One set of inputs and of float64 results for all implementations of a case."""
    return Bench(case, DEVICE, BOUNDS)


@pytest.mark.parametrize(("case", "implementation"), PAIRS)
def test_operator(case: Case, implementation: Implementation, benchmark) -> None:
    try:
        ready = bench(case).ready(implementation)
    except NoTime as none:
        if none.status in (rows.UNAVAILABLE, rows.OUT_OF_MEMORY):
            pytest.skip(none.reason)
        raise
    benchmark.group = case.title
    if DEVICE == "cuda":
        # pytest-benchmark reads the host's clock, so each call waits for the device. The runner uses events instead.
        benchmark(lambda: (ready.call(), torch.cuda.synchronize()))
    else:
        benchmark(ready.call)
