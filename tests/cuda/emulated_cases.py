"""The cases of cases.py on the emulation; run by test_emulated.py in a process of its own.

The emulated library registers its operators for CPU tensors, where the real CPU library has its own.
"""

from __future__ import annotations

import os

import pytest
import torch

from anomem.ops import deviation_map, retrieve, sampling  # noqa: F401  their schemas must exist before the library
from tests.cuda.cases import *  # noqa: F403
from tests.cuda.cases import DTYPES, OPERATORS, operator_calls


@pytest.fixture(scope="session")
def device() -> str:
    torch.ops.load_library(os.environ["ANOMEM_EMULATED_LIBRARY"])
    retrieve.KEPT_BYTES = 0  # weights are kept by the real CPU library alone
    return "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_bits_do_not_depend_on_the_order_of_threads(
    device: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, arguments = operator_calls(device, dtype)[name]
    results = []
    for order in ("forward", "backward"):
        monkeypatch.setenv("ANOMEM_EMULATION_ORDER", order)
        result = operator(*arguments)
        results.append((result,) if isinstance(result, torch.Tensor) else result)
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
