"""The smallest and largest sizes on a GPU of 80 GB: launches within CUDA's limits, no memory of size N·M or (2B)².

test_stand_in.py runs these cases. The allocator is torch's own, so its figures hold on any GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from anomem import functional as AF
from anomem import rules
from anomem.kernels.primitives import SCRATCH_BYTES
from anomem.kernels.retrieve_chunked import ROW_BYTES
from tests.stand_in.calls import HAVE_NATIVE, Call, nt_xent, retrieve
from tests.stand_in.recording import of, recorded

GIB = 2**30
DTYPES = [torch.float32, torch.bfloat16]
# N, M, d, dv (0: tied).
RETRIEVALS = [
    (0, 40, 64, 0),
    (1, 1, 16, 0),
    (1, 16384, 2048, 0),
    (2**25 + 8, 1, 64, 0),
    (2**21, 16384, 64, 0),
    (2**24, 300, 128, 40),
    (2**21, 16384, 256, 0),
    (2**22, 200, 512, 0),
    (2**20, 16384, 2048, 0),
]
# G, B, d.
CONTRASTS = [(1, 1, 16), (256, 1, 16), (256, 4096, 64), (256, 512, 1024), (1, 65536, 128), (1, 65536, 1024)]


@pytest.fixture(autouse=True)
def whole_gpu() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def peak_of(call: Callable[[], Any]) -> int:
    """Peak bytes of a call beyond those allocated before it; its results count."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with recorded() as entries:
        call()
    assert not of(entries, "fault")
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RETRIEVALS, ids=str)
@pytest.mark.parametrize("impl", ["triton", "native"] if HAVE_NATIVE else ["triton"])
def test_retrieval_takes_no_memory_for_scores(impl: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, m, d, dv = shape
    call = Call(retrieve(impl), [(n, d), (m, d), *([(m, dv)] if dv else [])], dtype)
    peak = peak_of(call)
    results = sum(x.nbytes for x in [*call.inputs, *call.upstream])
    prototypes = sum(x.numel() * 4 for x in call.inputs[1:])
    kept = 8 * n if impl == "triton" else 0  # largest score and log-sum of each query
    # Beside the results: float32 sums of the prototypes' gradients, normalised prototypes, and chunks.
    assert peak <= results + kept + 4 * prototypes + SCRATCH_BYTES + ROW_BYTES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONTRASTS, ids=str)
def test_contrast_takes_no_memory_for_similarities(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call = Call(nt_xent, [shape, shape], dtype)
    peak = peak_of(call)
    groups, pairs, features = shape
    row = 4 * (features + 8)  # bytes in float32, with what is kept for each row
    # Normalised rows, their gradients and the gradients returned; exact float32 stores a chunk of weights.
    weights = SCRATCH_BYTES if dtype == torch.float32 else 0
    assert peak <= 3 * groups * 2 * pairs * row + weights + 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_takes_a_kernel_where_plain_pytorch_does_not_fit(dtype: torch.dtype) -> None:
    """At the smallest size of the rule, forward and backward."""
    calls: list[tuple[Callable[..., Any], list[tuple[int, ...]]]] = [
        (lambda q, k, impl: AF.hopfield_retrieve(q, k, impl=impl), [(2**21, 16), (4096, 16)]),
        (lambda a, b, impl: AF.nt_xent(a, b, impl=impl), [(8, 16384, 16), (8, 16384, 16)]),
    ]
    for function, shapes in calls:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            Call(lambda *x, f=function: f(*x, impl="reference"), shapes, dtype)()
        torch.cuda.empty_cache()
        assert peak_of(Call(lambda *x, f=function: f(*x, impl="auto"), shapes, dtype)) < 2 * GIB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_pytorch_takes_what_the_rules_of_auto_say(dtype: torch.dtype) -> None:
    positive = torch.arange(8192, device="cuda")
    calls: list[tuple[str, Callable[..., Any], list[tuple[int, ...]]]] = [
        ("retrieve", lambda q, k: AF.hopfield_retrieve(q, k, impl="reference"), [(8192, 16), (8192, 16)]),
        ("nt_xent", lambda a, b: AF.nt_xent(a, b, impl="reference"), [(1, 4096, 16), (1, 4096, 16)]),
        (
            "info_nce",
            lambda r, c: AF.info_nce(r, c, positive, temperature=0.1, impl="reference"),
            [(8192, 16), (8192, 16)],
        ),
    ]
    for operator, function, shapes in calls:
        (rule,) = (rule for rule in rules.AUTO if (rule.operator, rule.device) == (operator, "cuda"))
        call = Call(function, shapes, dtype)
        call()
        size = peak_of(call) / 8192**2
        assert f" {size:.0f} bytes a score" in rule.reason
        assert f" {8 * round(size)} GiB" in rule.reason
