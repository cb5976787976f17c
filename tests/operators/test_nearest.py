"""The nearest prototypes and greedy k-center, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.functional import k_center, nearest
from anomem.rules import Impl
from anomem.testing import draw
from tests.operators.contract import (
    BF16,
    F32,
    F64,
    NATIVE,
    REFERENCE,
    TRITON,
    Contract,
    cases,
    compare_values,
    each,
    each_dtype,
)

ALL = (REFERENCE, NATIVE, TRITON)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TestNearest(Contract):
    implementations = ALL
    differentiable = False
    mapped = False

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 6, dtype=dtype), draw(9, 6, dtype=dtype, seed=1)]

    def call(self, impl: Impl, *inputs: Any) -> tuple[Tensor, ...]:
        x, prototypes = inputs[:2]
        return tuple(nearest(x, prototypes, k=3, impl=impl))

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        x, prototypes = self.inputs(7)
        for operator in ("nearest", "k_center"):
            arguments = (x[None], prototypes[None], 3) if operator == "nearest" else (x, 4, 1)
            yield getattr(torch.ops.anomem, f"{impl}_{operator}"), arguments


# N, M, d, k: tails of vectors, panels, tiles of columns and chunks of rows; the largest k, alone and among many.
SIZES = [(1, 1, 1, 1), (5, 3, 7, 3), (43, 70, 33, 1), (90, 1100, 40, 5), (9, 32, 16, 32), (43, 2100, 24, 32)]


@cases(
    "dtype, sizes",
    {
        REFERENCE: product([F32], SIZES[:3]),
        NATIVE: product(NATIVE.dtypes, SIZES),
        TRITON: [*product(TRITON.dtypes, SIZES[:3]), (F32, (9, 40, 20, 4)), (F32, (2, 2100, 8, 2))],
    },
)
def test_nearest_within_budget(impl: Impl, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    n, m, d, k = sizes

    def run(name: Impl, x: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
        return tuple(nearest(x, prototypes, k=k, impl=name))

    compare_values(run, impl, [draw(n, d, dtype=dtype), draw(m, d, dtype=dtype, seed=1)])


@cases("shared", {one: [(False,), (True,)] for one in ALL})
def test_banks_are_searched_one_by_one(impl: Impl, shared: bool) -> None:
    x, banks = draw(3, 20, 12), draw(3, 11, 12, seed=1)
    found = nearest(x[0] if shared else x, banks, k=2, impl=impl)
    for bank in range(3):
        alone = nearest(x[0 if shared else bank], banks[bank], k=2, impl=impl)
        torch.testing.assert_close(found.distance[bank], alone.distance)
        assert torch.equal(found.indices[bank], alone.indices)
    assert nearest(x, banks, impl=impl).indices.shape == (3, 20)


@each(*ALL)
def test_lowest_of_equal_prototypes(impl: Impl) -> None:
    """Whole numbers: every implementation computes the same distances, and many are equal."""
    x, prototypes = draw(30, 8).round(), draw(7, 8, seed=1).round().repeat(11, 1)
    found = nearest(x, prototypes, k=16, impl=impl)
    exact = torch.cdist(x.double(), prototypes.double()).square().round()
    expected = exact.sort(dim=1, stable=True)
    assert torch.equal(found.indices, expected.indices[:, :16])
    assert torch.equal(found.distance.double(), expected.values[:, :16])


@each_dtype(*ALL, among=(F32, BF16))
def test_a_prototype_is_nearest_to_itself(impl: Impl, dtype: torch.dtype) -> None:
    """At distance 0, however long it is: |x|² − 2 x·m + |m|² would not give 0."""
    prototypes = draw(40, 24, dtype=dtype) + 100
    prototypes[1:] += draw(39, 24, dtype=dtype, seed=1) * 8
    distance, index = nearest(prototypes, prototypes, impl=impl)
    assert torch.equal(index, torch.arange(40))
    assert not bool(distance.any())


@cases("bad", {one: [(torch.nan,), (torch.inf,)] for one in (REFERENCE, NATIVE)})
def test_a_bad_prototype_is_taken_last(impl: Impl, bad: float) -> None:
    x, prototypes = draw(20, 8), draw(5, 8, seed=1)
    prototypes[2, 3] = bad
    found = nearest(x, prototypes, k=5, impl=impl)
    rest = nearest(x, prototypes[[0, 1, 3, 4]], k=4, impl=impl)
    assert torch.equal(found.distance[:, :4], rest.distance)
    assert torch.equal(found.indices[:, 4], torch.full((20,), 2))
    assert not bool(found.distance[:, 4].isfinite().any())


@each(REFERENCE, NATIVE)
def test_a_bad_row_spoils_itself_only(impl: Impl) -> None:
    x, prototypes = draw(50, 8), draw(70, 8, seed=1)
    expected = nearest(x, prototypes, impl=impl)
    x[7, 2] = torch.nan
    found = nearest(x, prototypes, impl=impl)
    assert torch.equal(found.distance.isnan().nonzero().flatten(), torch.tensor([7]))
    good = torch.arange(50) != 7
    torch.testing.assert_close(found.distance[good], expected.distance[good])
    assert int(found.indices[7]) == 0


@each(NATIVE)
def test_nearly_equal_prototypes_are_told_apart(impl: Impl) -> None:
    """Closer to each other than bfloat16 can tell, and all of them candidates: the rough product decides nothing."""
    base = draw(1, 64)
    prototypes = base + draw(1500, 64, seed=1) * 2e-3
    x = prototypes[torch.randperm(1500)[:100]] + draw(100, 64, seed=2) * 1e-4
    compare_values(lambda name, *tensors: tuple(nearest(*tensors, k=2, impl=name)), impl, [x, prototypes])


def greedy(x: Tensor, count: int, first: int) -> list[int]:
    """K-center in float64, one row at a time."""
    chosen, distance = [first], torch.full((len(x),), torch.inf, dtype=F64)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (x.double() - x[chosen[-1]].double()).square().sum(dim=1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return chosen


@cases(
    "dtype, sizes",
    {
        REFERENCE: [(F32, (50, 9, 10))],
        NATIVE: product(NATIVE.dtypes, [(1, 3, 1), (50, 9, 50), (1500, 20, 300)]),
        TRITON: [(F32, (1, 3, 1)), (BF16, (50, 9, 12)), (F32, (600, 5, 3))],
    },
)
def test_k_center_takes_the_farthest(impl: Impl, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    n, d, count = sizes
    x = draw(n, d, dtype=dtype)
    assert k_center(x, count, first=n // 2, impl=impl).tolist() == greedy(x, count, n // 2)


@cases("sizes", {NATIVE: [((2000, 40),), ((9000, 200),)], REFERENCE: [((300, 20),)], TRITON: [((64, 8),)]})
def test_k_center_of_clusters(impl: Impl, sizes: tuple[int, int]) -> None:
    """One row of each cluster in a row, so that the pool of the farthest is used up again and again."""
    n, count = sizes
    x = draw(12, 16, seed=1)[torch.arange(n) % 12] * 4 + draw(n, 16) * 0.05
    assert k_center(x, count, impl=impl).tolist() == greedy(x, count, 0)


@each(*ALL)
def test_k_center_of_equal_rows_is_distinct(impl: Impl) -> None:
    x = draw(4, 5).round().repeat(6, 1)
    chosen = k_center(x, 24 if impl != "triton" else 9, impl=impl).tolist()
    assert chosen == greedy(x, len(chosen), 0)
    assert len(set(chosen)) == len(chosen)


@cases("place, first", {one: [(0, 5), (3, 5), (3, 3)] for one in ALL})
def test_a_row_with_a_nan_is_chosen_once_and_last(impl: Impl, place: int, first: int) -> None:
    x = draw(20, 6)
    x[place, 2] = torch.nan
    chosen = k_center(x, 20, first=first, impl=impl).tolist()
    assert sorted(chosen) == list(range(20))
    assert place in (chosen[0], chosen[-1])
    others = [i for i in range(20) if i != place]
    if first != place:
        expected = greedy(x[others], 19, others.index(first))
        assert chosen[:-1] == [others[i] for i in expected]


@cases("ratio", {NATIVE: [(1e2,), (1e4,), (1e6,)], REFERENCE: [(1e2,)]})
def test_rows_far_longer_than_the_prototypes_find_the_nearest(impl: Impl, ratio: float) -> None:
    """All their distances may round to one number; one prototype is longer than the others."""
    x, prototypes = draw(252, 64) * ratio, draw(1500, 64, seed=1)
    prototypes[7] *= 8
    key = prototypes.double().square().sum(1) / 2 - x.double() @ prototypes.double().T
    found = nearest(x, prototypes, k=1, impl=impl).indices
    least = key.gather(1, found)[:, 0] - key.min(1).values
    # A float32 product of 64 terms may be that far off; the kernel ranks in double.
    assert (least <= (1e-13 if impl == "native" else 64 * 6e-8) * ratio * 100).all()
    with torch_threads(3):
        assert torch.equal(nearest(x, prototypes, k=1, impl=impl).indices, found)


@cases("size, dtype", {NATIVE: [*product((1.5e19, 1.9e19), (F32, BF16)), *((s, F64) for s in (1.5e154, 1.5e308))]})
@pytest.mark.parametrize("count", [5, 40, 1100])
def test_prototypes_whose_squares_overflow_are_found(impl: Impl, size: float, dtype: torch.dtype, count: int) -> None:
    """Their distances do not."""
    prototypes = torch.full((count, 2), 0.53 * size, dtype=dtype)
    prototypes[-2:] = size
    found = nearest(prototypes[-1:].expand(3, 2), prototypes, k=1, impl=impl)
    assert (found.indices == count - 2).all()
    assert (found.distance == 0).all()


@cases("common, dtype", {NATIVE: product((1.0, 1e3, 1e5), (F32, F64))})
def test_near_rows_with_much_in_common_find_the_nearest(impl: Impl, common: float, dtype: torch.dtype) -> None:
    """Twins among the prototypes, close to the rows and far from the origin; a prototype is nearest to itself."""
    half = draw(300, 16, seed=1, dtype=dtype)
    prototypes = torch.cat([half, half + 1e-3 * draw(300, 16, seed=2, dtype=dtype)])
    prototypes[:, 0] = common
    x = torch.cat([prototypes[::3], prototypes[:100] + 1e-3 * draw(100, 16, seed=3, dtype=dtype)])
    distances = torch.cdist(x.double(), prototypes.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    found = nearest(x, prototypes, k=2, impl=impl)
    least = distances.topk(2, largest=False).values
    torch.testing.assert_close(distances.gather(1, found.indices), least, rtol=1e-5, atol=1e-12)
    assert torch.equal(found.indices[:200, 0], torch.arange(0, 600, 3))


@each(NATIVE)
def test_k_center_of_rows_with_much_in_common(impl: Impl) -> None:
    x = draw(2000, 8) * 1e-2
    x[:, 0] = 1e5
    assert k_center(x, 400, impl=impl).tolist() == greedy(x, 400, 0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    x, prototypes = draw(700, 20), draw(300, 20, seed=1)
    expected = *nearest(x, prototypes, k=4, impl="native"), k_center(x, 100, impl="native")
    with torch_threads(threads):
        found = *nearest(x, prototypes, k=4, impl="native"), k_center(x, 100, impl="native")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: nearest(draw(5, 4), draw(3, 5)), "prototypes"),
        (lambda: nearest(draw(5, 4), draw(0, 4)), "prototypes"),
        (lambda: nearest(draw(5, 0), draw(3, 0)), "x"),
        (lambda: nearest(draw(2, 5, 4), draw(3, 3, 4)), "x"),
        (lambda: nearest(draw(5, 4), draw(3, 4).double()), "prototypes"),
        (lambda: nearest(draw(5, 4), draw(3, 4), k=4), "k"),
        (lambda: nearest(draw(5, 4), draw(3, 4), k=0), "k"),
        (lambda: nearest(draw(5, 4), draw(50, 4), k=33), "k"),
        (lambda: k_center(draw(5, 4), 6), "count"),
        (lambda: k_center(draw(5, 4), 0), "count"),
        (lambda: k_center(draw(5, 4), 2, first=5), "first"),
        (lambda: k_center(draw(5, 4, 4), 2), "x"),
        (lambda: k_center(draw(0, 4), 1), "x"),
    ],
)
def test_mistakes(call: Any, argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        call()
