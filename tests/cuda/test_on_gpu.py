"""The CUDA operators on a GPU: the cases that the emulation runs, and what only a GPU can show.

`compute-sanitizer --tool memcheck python -m pytest tests/cuda/test_on_gpu.py` runs them under NVIDIA's checks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import functional, reference
from anomem.ops import native
from anomem.testing import compare, draw
from tests.cuda import cases
from tests.cuda.cases import *  # noqa: F403
from tests.cuda.cases import DTYPES, OPERATORS, operator_calls

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def device() -> str:
    obstacle = native.obstacle("cuda")
    assert obstacle is None, obstacle
    return "cuda"


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    """TF32 products would not keep the budget of float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_bits_repeat(device: str, name: str, dtype: torch.dtype) -> None:
    operator, arguments = operator_calls(device, dtype)[name]
    first, second = (operator(*arguments) for _ in range(2))
    pairs = [(first, second)] if isinstance(first, Tensor) else list(zip(first, second, strict=True))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_use_the_kernels(device: str, dtype: torch.dtype) -> None:
    """`impl="native"` from the documented functions down, in the sizes of a training step."""
    positions = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:64].to(device)
    compare(
        lambda x: functional.variance_hinge(
            functional.gather_positions(x, positions, normalize=True, impl="native"), gamma=0.1, impl="native"
        ),
        lambda x: reference.variance_hinge(
            cases.accumulated(reference.gather_positions(x, positions, normalize=True)), 0.1
        ).mean(),
        [draw(64, 128, 16, 16, dtype=dtype).to(device)],
    )
    compare(
        lambda q, k: functional.hopfield_retrieve(q, k, impl="native"),
        lambda q, k: reference.hopfield_retrieve(q, k).out,
        [draw(5000, 128, dtype=dtype).to(device), draw(512, 128, dtype=dtype, seed=1).to(device)],
    )


def test_kernels_run_on_the_current_stream(device: str) -> None:
    x = draw(16, 512, 256).to(device)
    expected = reference.variance_hinge(x, 1.2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = x * 1.0  # written on this stream only after the wait
        loss = functional.variance_hinge(late, gamma=1.2, reduction="none", impl="native")
    stream.synchronize()
    torch.testing.assert_close(loss, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_tensors_device(device: str) -> None:
    x = draw(2, 64, 32)
    with torch.cuda.device(0):
        loss = functional.variance_hinge(x.to("cuda:1"), gamma=1.2, impl="native")
    assert loss.device == torch.device("cuda:1")
    torch.testing.assert_close(loss.cpu(), reference.variance_hinge(x, 1.2).mean())


def test_operators_do_not_wait_for_the_device(device: str) -> None:
    """No operator may read a value back: torch reports every synchronisation as an error here."""
    calls = operator_calls(device, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for operator, arguments in calls.values():
            operator(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_retrieval_keeps_nothing_of_size_queries_by_prototypes(device: str) -> None:
    query, keys = torch.randn(1 << 18, 64, device=device), torch.randn(1024, 64, device=device)
    torch.ops.anomem.native_retrieve_fwd(query[:256], keys, None, None, 0.1, 1)  # the library's own workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = torch.ops.anomem.native_retrieve_fwd(query, keys, None, None, 0.1, 1)
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra < 32 << 20, f"{extra / 2**20:.0f} MiB beside the output; the matrix of scores has 1024 MiB"
