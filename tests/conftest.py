"""Settings of the whole suite."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels run in Triton's interpreter, on CPU tensors, except under `-m gpu`.

    It must be switched on before anything imports triton, which torch.compile does: hence here, not beside the tests.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is a CUDA GPU and say so where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> object:
    """Every test runs with uninitialised memory filled with NaN, so that a value nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
