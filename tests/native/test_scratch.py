"""Scratch memory that a process keeps between calls (csrc/cpu/scratch.h): no call reads what another left there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomem.functional import (
    batch_norm,
    conv3x3,
    deviation_map,
    hopfield_retrieve,
    info_nce,
    memory_diagnostics,
    nearest,
    nt_xent,
    read_memory,
)
from anomem.testing import draw, gradients

Call = Callable[..., Tensor | tuple[Tensor, ...]]

CALLS: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "retrieve": (lambda q, k: hopfield_retrieve(q, k, impl="native"), [(300, 24), (70, 24)]),
    "retrieve, kept": (lambda q, k: hopfield_retrieve(q, k, impl="native"), [(2100, 64), (200, 64)]),
    "retrieve, values": (
        lambda q, k, v: hopfield_retrieve(q, k, values=v, impl="native"),
        [(2100, 64), (90, 64), (90, 33)],
    ),
    "retrieve, large memory": (lambda q, k: hopfield_retrieve(q, k, impl="native"), [(2100, 33), (1601, 33)]),
    "shrink": (lambda q, k: hopfield_retrieve(q, k, shrink=0.02, impl="native"), [(300, 24), (70, 24)]),
    "nt_xent": (lambda a, b: nt_xent(a, b, impl="native"), [(3, 150, 40), (3, 150, 40)]),
    "info_nce": (lambda a, b: info_nce(a, b, torch.arange(300), impl="native"), [(1, 300, 40), (1, 500, 40)]),
    "read": (lambda x, m: read_memory(x, m, impl="native").out, [(300, 24), (70, 24)]),
    "conv3x3": (lambda x, w: conv3x3(x, w, impl="native"), [(5, 40, 20, 20), (33, 40, 3, 3)]),
    "batch_norm": (
        lambda x, w, b: batch_norm(x, None, None, w, b, True, impl="native"),
        [(9, 40, 30, 31), (40,), (40,)],
    ),
}
FORWARD: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "deviation_map": (lambda x, m: deviation_map(x, m, impl="native"), [(3, 24, 20, 20), (70, 24)]),
    "usage": (lambda q, m: tuple(memory_diagnostics(q, m, impl="native")), [(1300, 24), (70, 24)]),
    "nearest": (lambda x, m: tuple(nearest(x, m, k=4, impl="native")), [(300, 24), (70, 24)]),
}


def assert_nothing_is_left(run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> None:
    """The same bits after a call that fills the scratch memory with NaN."""
    first = run(inputs)
    run([torch.full_like(x, torch.nan) for x in inputs])
    assert all(torch.equal(x, y) for x, y in zip(first, run(inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_both_passes(library: None, name: str, dtype: torch.dtype) -> None:
    call, shapes = CALLS[name]
    inputs = [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    assert_nothing_is_left(lambda tensors: list(gradients(call, tensors)), inputs)


@pytest.mark.parametrize("name", FORWARD)
def test_forward(library: None, name: str) -> None:
    call, shapes = FORWARD[name]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        result = call(*tensors)
        return [result] if isinstance(result, Tensor) else list(result)

    assert_nothing_is_left(run, inputs)


def test_peak_is_that_of_one_call(library: None) -> None:
    """What benchmarks add to the memory that torch sees."""
    query, memory = draw(2100, 64), draw(200, 64, seed=1)
    hopfield_retrieve(query, memory, impl="native")
    peak = torch.ops.anomem.native_scratch_peak
    peak(query)
    assert peak(query) == 0
    hopfield_retrieve(query, memory, impl="native")
    assert 200 * 64 * 4 < peak(query) < 16 << 20
    assert peak(query) == 0


def test_peak_does_not_depend_on_the_calls_before(library: None, one_thread: None) -> None:
    """A call may be given kept blocks that are larger than it asked for."""
    query, peak = draw(2100, 64), torch.ops.anomem.native_scratch_peak

    def peak_of(prototypes: int) -> int:
        memory = draw(prototypes, 64, seed=1)
        peak(query)
        hopfield_retrieve(query, memory, impl="native")
        return peak(query)

    small = [peak_of(prototypes) for prototypes in range(320, 640, 64)]
    for prototypes in range(600, 340, -30):
        peak_of(prototypes)
    assert [peak_of(prototypes) for prototypes in range(320, 640, 64)] == small


def test_a_memory_in_blocks_takes_no_scores_of_all_of_it(library: None, one_thread: None) -> None:
    """Scores of a whole memory, 192 × 50,000 here, are for chunks that are not read in blocks."""
    query, memory, peak = draw(192, 16), draw(50_000, 16, seed=1), torch.ops.anomem.native_scratch_peak
    hopfield_retrieve(query, memory, normalize="none", impl="native")
    if not torch.ops.anomem.native_retrieve_blocks(query, memory, None):
        pytest.skip("this processor reads no memory in blocks")
    for gradient in (False, True):
        leaf = query.clone().requires_grad_(gradient)
        peak(query)
        out = hopfield_retrieve(leaf, memory, normalize="none", impl="native")
        if gradient:
            out.sum().backward()
        assert peak(query) < 3 * memory.nbytes + 192 * 50_000 * 2
