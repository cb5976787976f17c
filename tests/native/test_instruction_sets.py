"""Gather, variance hinge, deviation map and usage on older instruction sets; the other tests run the newest one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from anomem import functional as F, reference as R
from anomem.testing import assert_within_budget, compare, draw

positions = torch.tensor([3, 0, 3, 7])
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    compare(
        lambda x: F.gather_positions(x, positions, normalize=True, impl="native"),
        lambda x: R.gather_positions(x, positions, normalize=True),
        [draw(3, 37, 2, 4, dtype=dtype)],
    )
for dtype in (torch.float32, torch.float64):
    compare(
        lambda x: F.variance_hinge(x, gamma=2.0, reduction="none", impl="native"),
        lambda x: R.variance_hinge(x, 2.0),
        [draw(3, 37, 21, dtype=dtype)],
    )
for shape in ((2, 37, 5, 5), (1, 64, 33, 32)):
    x, keys = draw(*shape), draw(70, shape[1], seed=1)
    rows = x.flatten(2).mT.reshape(-1, shape[1])
    for run in (
        lambda x, rows, keys, impl: F.deviation_map(x, keys, impl=impl),
        lambda x, rows, keys, impl: F.memory_diagnostics(rows, keys, impl=impl).mass,
    ):
        exact = run(x.double(), rows.double(), keys.double(), "reference")
        assert_within_budget(run(x, rows, keys, "native"), run(x, rows, keys, "reference"), exact)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_gather_variance_map_and_usage(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "ANOMEM_CPU": isa}, capture_output=True, text=True, check=False
    )
    if "cannot run it" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
