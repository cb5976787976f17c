"""The figures that describe a memory in use, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from anomem.functional import memory_diagnostics
from anomem.rules import Impl
from anomem.testing import draw
from tests.operators.contract import F32, NATIVE, REFERENCE, Contract, cases, compare_values, each

ALL = (REFERENCE, NATIVE)


class TestUsage(Contract):
    """Rows are queries, at least one."""

    implementations = ALL
    differentiable = False
    mapped = False
    sizes = (1, 17)

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 6, dtype=dtype, seed=2), draw(4, 6, dtype=dtype, seed=1)]

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        return [torch.tensor(0.4)]

    def call(self, impl: Impl, *inputs: Any) -> tuple[Tensor, ...]:
        query, prototypes, *beta = inputs
        return memory_diagnostics(query, prototypes, beta=beta[0] if beta else None, impl=impl)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        for beta in (None, torch.tensor(0.4)):
            yield torch.ops.anomem.native_usage, (*self.inputs(7), beta, 0.5, 1)


@cases(
    "dtype, normalize, sizes",
    {NATIVE: product(NATIVE.dtypes, ["layer", "l2", "none"], [(1, 1, 1), (5, 3, 7), (513, 70, 33), (1300, 9, 64)])},
)
def test_diagnostics_within_budget(impl: Impl, dtype: torch.dtype, normalize: Any, sizes: tuple[int, int, int]) -> None:
    """Counts exactly; mass, entropies and mean length by the budget."""
    n, m, d = sizes

    def run(name: Impl, query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
        return memory_diagnostics(query, prototypes, normalize=normalize, impl=name)

    compare_values(run, impl, [draw(n, d, dtype=dtype), draw(m, d, dtype=dtype, seed=1)])


@each(*ALL)
def test_first_of_equal_prototypes_counts(impl: Impl) -> None:
    query, prototypes = draw(50, 8), draw(3, 8, seed=1).repeat(2, 1)
    used = memory_diagnostics(query, prototypes, impl=impl).usage
    assert used[3:].tolist() == [0, 0, 0]
    assert torch.equal(used, memory_diagnostics(query, prototypes, impl="reference").usage)


@each(*ALL)
def test_the_order_of_the_queries_does_not_matter(impl: Impl) -> None:
    query, prototypes = draw(300, 8), draw(9, 8, seed=1)
    expected = memory_diagnostics(query, prototypes, impl=impl)
    for got, same in zip(memory_diagnostics(query[torch.randperm(300)], prototypes, impl=impl), expected, strict=True):
        torch.testing.assert_close(got, same)


@each(*ALL)
def test_queries_whose_squares_overflow(impl: Impl) -> None:
    query, prototypes = draw(50, 8), draw(9, 8, seed=1)
    for normalize in ("layer", "l2"):
        expected = memory_diagnostics(query * 2.0**20, prototypes, normalize=normalize, impl=impl)
        got = memory_diagnostics(query * 2.0**70, prototypes, normalize=normalize, impl=impl)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
