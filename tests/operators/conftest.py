"""Sets up the implementation that a test is given, and gives each test of a contract every implementation in turn."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from anomem.ops import native
from anomem.rules import Impl
from tests.operators.contract import Contract, Implementation, cases, each, fault


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is None or not issubclass(metafunc.cls, Contract) or "impl" not in metafunc.fixturenames:
        return
    if any("impl" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
        return
    implementations = metafunc.cls.implementations
    if hasattr(metafunc.function, "of_the_operator"):
        implementations = {one.name: one for one in reversed(implementations)}.values()
    if "dtype" in metafunc.fixturenames:
        faults = metafunc.cls.no_rows_fail if metafunc.function.__name__ == "test_no_rows" else {}

        def row(one: Implementation, dtype: torch.dtype) -> Any:
            reason = faults.get((one, dtype))
            return (dtype,) if reason is None else fault(reason, dtype, raises=RuntimeError)

        mark = cases("dtype", {one: [row(one, dtype) for dtype in one.dtypes] for one in implementations})
    else:
        mark = each(*implementations)
    metafunc.parametrize(*mark.args, **mark.kwargs)


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Impl]:
    """The name that `impl=` takes, with what the implementation needs."""
    implementation: Implementation = request.param
    if implementation.name == "native" and (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)  # `make test` builds it first
    if implementation.name == "triton":
        request.getfixturevalue("interpreter")
        # A chunk of rows is made as short as it can be: a few rows fill several.
        monkeypatch.setattr("anomem.kernels.primitives.SCRATCH_BYTES", 1)
        if implementation.allow_tf32:
            # Exact products: the budget is that of float32. tests/kernels/test_tf32.py tests the rounding.
            for name in ("round_to_tf32", "truncate_to_tf32"):
                monkeypatch.setattr(f"anomem.kernels.primitives.{name}", lambda x: x)
    poison_malloc(implementation.name == "native")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if implementation.allow_tf32 else "ieee"
    yield implementation.name
    torch.backends.cuda.matmul.fp32_precision = before
    poison_malloc(False)


def poison_malloc(on: bool) -> None:
    """Fill what glibc's malloc gives with NaN: the scratch of the C++ kernels comes from it, not from torch."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-6, 0x100 if on else 0)  # M_PERTURB: its low byte is inverted
