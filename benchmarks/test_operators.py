"""`pytest benchmarks/`: the smoke cases of every operator and implementation under pytest-benchmark.

The numbers are checked first; an implementation that cannot run here is skipped with its reason, a wrong one fails.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks import rows
from benchmarks.case import Case, Implementation
from benchmarks.prepare import Bench, Bounds, NoTime
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
        # pytest-benchmark has the host's clock: it must wait for the device. The runner uses events instead.
        benchmark(lambda: (ready.subject.call(), torch.cuda.synchronize()))
    else:
        benchmark(ready.subject.call)
