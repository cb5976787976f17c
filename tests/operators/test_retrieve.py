"""Retrieval from a memory by every implementation: the contract, every shape, invariances, errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import backends
from anomem.errors import ArgumentError
from anomem.functional import hopfield_retrieve
from anomem.ops import library
from anomem.ops import retrieve as ops_retrieve
from anomem.rules import Impl
from anomem.testing import compare, draw
from tests.operators.contract import (
    BF16,
    F16,
    F32,
    F64,
    NATIVE,
    REFERENCE,
    TRITON,
    TRITON_TF32,
    Contract,
    cases,
    each,
    each_dtype,
)
from tests.operators.retrieve_calls import ALL, KERNELS, NORMALIZE, check, memory, pair, plain, retrieval

OPERATORS = torch.ops.anomem


class TestTied(Contract):
    """The prototypes are read."""

    implementations = ALL
    many = 97

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return list(pair(rows, 5, 6, dtype))

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        return [torch.tensor(0.8, dtype=F64 if dtype == F64 else F32)]

    def call(self, impl: Impl, *inputs: Any) -> Any:
        query, prototypes, *beta = inputs
        return hopfield_retrieve(query, prototypes, beta=beta[0] if beta else None, return_lse=True, impl=impl)

    def plain(self, impl: Impl, *inputs: Any) -> Any:
        return plain(impl)(*inputs)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        query, prototypes, values = memory(6, 5, 4, 3)
        forward, backward = (getattr(OPERATORS, f"{impl}_retrieve_{direction}") for direction in ("fwd", "bwd"))
        for v, beta in ((values, torch.tensor(0.7)), (None, None)):
            arguments = (query, prototypes, v, beta, 0.5, 1)
            out, lse, *normaliser = forward(*arguments)
            yield forward, arguments
            yield backward, (torch.ones_like(out), torch.ones_like(lse), *arguments, out, lse, *normaliser)


class TestWithValues(TestTied):
    """Other vectors are read."""

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [*super().inputs(rows, dtype), draw(5, 3, dtype=dtype, seed=3)]

    def call(self, impl: Impl, *inputs: Any) -> Any:
        query, prototypes, values, *beta = inputs
        return retrieval(impl, normalize="none")(query, prototypes, values, *beta)

    def plain(self, impl: Impl, *inputs: Any) -> Any:
        return plain(impl, normalize="none")(*inputs)


class TestShrunk(TestTied):
    """With a threshold under the weights, and with their entropy."""

    implementations = (REFERENCE, NATIVE)

    def call(self, impl: Impl, *inputs: Any) -> Any:
        query, prototypes, *beta = inputs
        return retrieval(impl, shrink=0.1)(query, prototypes, None, *beta)

    def plain(self, impl: Impl, *inputs: Any) -> Any:
        return self.call("reference", *inputs)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        query, prototypes, values = memory(6, 5, 4, 3)
        arguments = (query, prototypes, values, torch.tensor(0.35), 0.5, 1, 0.1)
        results = OPERATORS.native_shrink_fwd(*arguments)
        yield OPERATORS.native_shrink_fwd, arguments
        yield OPERATORS.native_shrink_bwd, (*(torch.ones_like(x) for x in results), *arguments, results[1])


# N, M, d, dv, normalize. Every N, M and d meets a tail of some block: of the vectors, of the panels, of the rows of a
# register block, of the chunks of rows.
NATIVE_SHAPES = [
    (0, 3, 7, 0, "layer"),
    (1, 1, 1, 0, "none"),
    (5, 3, 7, 4, "layer"),
    (1, 70, 64, 0, "l2"),
    (5, 600, 100, 0, "layer"),
    (513, 1, 64, 9, "l2"),
    (513, 70, 7, 0, "none"),
    (513, 70, 64, 0, "layer"),
    (513, 600, 100, 33, "l2"),
    (1100, 70, 64, 0, "layer"),
    (1100, 3, 1, 5, "none"),
    (140, 70, 37, 0, "layer"),
    (1030, 9, 64, 0, "layer"),
]
TRITON_SHAPES = [(17, 5, 16, 0), (65, 70, 24, 40), (17, 70, 100, 0), (129, 5, 300, 20)]
ONE_QUERY_OR_PROTOTYPE = [(1, 70, 64, 0), (65, 1, 16, 24), (2, 33, 64, 16)]
BETAS = {"none": 0.3, "layer": 0.2, "l2": 4.0}
# bfloat16 and float16 rows of more than 256 features and a memory of up to 256 prototypes take the resident forward.
LONG_ROWS = [(35, 70, 300, 0), (9, 5, 260, 300), (33, 257, 270, 0)]


def triton_cases(dtypes: tuple[torch.dtype, ...]) -> list[tuple[Any, ...]]:
    return [
        *((dtype, *shape, n, BETAS[n]) for dtype, shape, n in product(dtypes, TRITON_SHAPES, NORMALIZE)),
        *((F32, *shape, "layer", None) for shape in ONE_QUERY_OR_PROTOTYPE if F32 in dtypes),
        *((BF16, *shape, "layer", 0.2) for shape in LONG_ROWS if BF16 in dtypes),
        *((F16, *shape, "layer", 0.2) for shape in LONG_ROWS[:1] if F16 in dtypes),
    ]


@cases(
    "dtype, n, m, d, dv, normalize, beta",
    {
        NATIVE: [(dtype, *shape, 0.7) for dtype, shape in product(NATIVE.dtypes, NATIVE_SHAPES)],
        TRITON: triton_cases(TRITON.dtypes),
        TRITON_TF32: triton_cases(TRITON_TF32.dtypes),
    },
)
def test_within_budget(
    impl: Impl, dtype: torch.dtype, n: int, m: int, d: int, dv: int, normalize: str, beta: float | None
) -> None:
    check(impl, memory(n, m, d, dv, dtype), normalize=normalize, beta=beta)


@each(*ALL)
def test_a_large_beta_reads_the_nearest_prototype(impl: Impl) -> None:
    query, prototypes, values = memory(60, 40, 24, 8)
    nearest = (query @ prototypes.mT).argmax(dim=1)
    out = hopfield_retrieve(query, prototypes, normalize="none", beta=1e6, impl=impl)
    assert torch.equal(out, prototypes[nearest])
    unit = torch.nn.functional.normalize
    nearest = (unit(query) @ unit(prototypes).mT).argmax(dim=1)
    out = hopfield_retrieve(query, prototypes, values=values, normalize="l2", beta=1e6, impl=impl)
    assert torch.equal(out, values[nearest])


@each(NATIVE)
def test_a_call_without_gradients_takes_no_autograd_function(impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    query, prototypes = draw(8, 16, seed=1), draw(9, 16, seed=2)
    expected = hopfield_retrieve(query.clone().requires_grad_(), prototypes, impl=impl)
    monkeypatch.setattr(library, "_in_one_step", None)
    monkeypatch.setattr(ops_retrieve, "_FewReads", None)
    assert torch.equal(hopfield_retrieve(query, prototypes, impl=impl), expected)
    with torch.no_grad():
        assert torch.equal(hopfield_retrieve(query.requires_grad_(), prototypes, impl=impl), expected)
    for _ in range(2):  # the first is a call like earlier ones
        with pytest.raises((TypeError, AttributeError)):
            hopfield_retrieve(query, prototypes, impl=impl)
        backends.forget()


@cases("rows, shrink", {one: [(260, 0.0), (40, 0.0), (40, 0.01)] for one in (REFERENCE, NATIVE)})
def test_the_result_may_be_changed_in_place(impl: Impl, rows: int, shrink: float) -> None:
    query, prototypes = draw(rows, 16, seed=1).requires_grad_(), draw(9, 16, seed=2)
    out, entropy = hopfield_retrieve(query, prototypes, shrink=shrink, return_entropy=True, impl=impl)
    expected = torch.autograd.grad(out.square().sum() + entropy.sum(), query)
    out, entropy = hopfield_retrieve(query, prototypes, shrink=shrink, return_entropy=True, impl=impl)
    loss = (out.mul_(2).square() / 4).sum() + entropy.add_(1).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, query), expected)
    out = hopfield_retrieve(query, prototypes, shrink=shrink, impl=impl)
    (expected_alone,) = torch.autograd.grad(out.sum(), query)
    out = hopfield_retrieve(query, prototypes, shrink=shrink, impl=impl)
    torch.testing.assert_close(torch.autograd.grad(out.mul_(2).sum() / 2, query)[0], expected_alone)


@each(*ALL)
def test_strided_queries(impl: Impl) -> None:
    """Rows of a wider tensor, columns of a transposed one, an expanded row, leading axes."""
    wide, prototypes = draw(30, 40, seed=1), draw(9, 16, seed=2)
    for query in (wide[::2, 3:19], draw(16, 30, seed=1).T, draw(16, seed=1).expand(30, 16), draw(2, 3, 16)[:, ::2]):
        strided = hopfield_retrieve(query, prototypes, impl=impl)
        assert torch.equal(strided, hopfield_retrieve(query.contiguous(), prototypes, impl=impl))
        check(impl, [query, prototypes])
    check(impl, [draw(33, 48, seed=1)[:, 8:32], draw(35, 48, seed=2)[:, 8:32]])


@each(*KERNELS)
def test_only_the_log_sum_has_a_gradient(impl: Impl) -> None:
    compare(lambda q, k: retrieval(impl)(q, k)[1], lambda q, k: plain(impl)(q, k)[1], memory(17, 35, 24)[:2])


@cases("dv", {one: [(0,), (5,)] for one in ALL})
def test_no_query(impl: Impl, dv: int) -> None:
    leaves = [x.requires_grad_() for x in (*memory(0, 5, 16, dv), torch.tensor(0.5)) if x is not None]
    query, prototypes, *values, beta = leaves
    out, lse = retrieval(impl)(query, prototypes, values[0] if values else None, beta)
    assert out.shape == (0, dv or 16)
    assert lse.shape == (0,)
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), leaves):
        assert not gradient.any()


@cases("normalize, bad", {one: product(NORMALIZE, [torch.nan, torch.inf, -torch.inf]) for one in ALL})
def test_a_bad_query_spoils_its_own_row_only(impl: Impl, normalize: str, bad: float) -> None:
    query, prototypes = pair(40, 35, 16)
    broken = query.clone()
    broken[3, 5] = bad
    rest = torch.arange(40) != 3
    leaf = broken.requires_grad_()
    out, lse = retrieval(impl, normalize=normalize)(leaf, prototypes)
    expected, expected_lse = retrieval("reference", normalize=normalize)(broken.detach(), prototypes)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    assert not out[3].isfinite().any()
    clean, clean_lse = retrieval(impl, normalize=normalize)(query, prototypes)
    assert torch.equal(out[rest], clean[rest])
    assert torch.equal(lse[rest], clean_lse[rest])
    (gradient,) = torch.autograd.grad(out.sum() if impl == "native" else out.sum() + lse.sum(), leaf)
    assert bool(gradient[rest].isfinite().all())
    assert bool(gradient[3].isnan().all())


@each(*KERNELS)
def test_a_zero_row_has_no_length(impl: Impl) -> None:
    query, prototypes = pair(17, 35, 24)
    query[2] = 0
    prototypes[4] = 0
    check(impl, [query, prototypes], normalize="l2")


@cases("n, m", {NATIVE: [(1300, 70)], TRITON: [(300, 35)], TRITON_TF32: [(300, 35)]})
def test_queries_do_not_see_each_other(impl: Impl, n: int, m: int) -> None:
    """Bitwise: the same place in a block of rows, other neighbours."""
    query, prototypes = pair(n, m, 24)
    other = draw(n, 24, seed=9)
    other[::3] = query[::3]
    first, second = (hopfield_retrieve(q, prototypes, impl=impl) for q in (query, other))
    assert torch.equal(first[::3], second[::3])


@each(*ALL)
def test_permutations(impl: Impl) -> None:
    """Of the queries: the same rows in the new order. Of the prototypes: the same numbers within the budget."""
    query, prototypes = pair(70, 40, 24)
    order = torch.randperm(40)
    compare(lambda q, k: retrieval(impl)(q, k[order]), plain(impl), [query, prototypes])
    order = torch.randperm(70)
    compare(lambda q, k: retrieval(impl)(q[order], k), lambda q, k: plain(impl)(q[order], k), [query, prototypes])
    permuted, whole = retrieval(impl)(query[order], prototypes), retrieval(impl)(query, prototypes)
    for got, expected in zip(permuted, whole, strict=True):
        torch.testing.assert_close(got, expected[order], rtol=1e-5, atol=1e-6)


@cases("normalize", {one: [(normalize,) for normalize in NORMALIZE] for one in (REFERENCE, NATIVE)})
def test_derivatives_with_every_normalisation(impl: Impl, normalize: str) -> None:
    leaves = [x.requires_grad_() for x in (*memory(4, 5, 6, 3, F64), torch.tensor(0.8, dtype=F64)) if x is not None]
    assert torch.autograd.gradcheck(retrieval(impl, normalize=normalize), leaves)
    query, prototypes, _, beta = leaves
    assert torch.autograd.gradcheck(retrieval(impl, normalize=normalize), (query, prototypes, None, beta))


@each_dtype(*ALL)
def test_what_is_read_has_the_dtype_of_the_query(impl: Impl, dtype: torch.dtype) -> None:
    """And its log sum float32."""
    out, lse = retrieval(impl)(*pair(6, 5, 4, dtype))
    assert out.dtype == dtype
    assert lse.dtype == F32


def test_rows_too_long_are_refused() -> None:
    with pytest.raises(ArgumentError, match="up to 2048, not 2049"):
        hopfield_retrieve(torch.zeros(1, 2049), torch.zeros(1, 2049), impl="triton")


@cases("create_graph", {one: [(False,), (True,)] for one in ALL})
def test_values_that_were_not_used_have_no_gradient(impl: Impl, create_graph: bool) -> None:
    """None as of any unused parameter: an optimizer's weight decay would move one whose gradient is zero."""
    query, prototypes, values, _ = (*memory(7, 5, 16, 3), None)
    leaves = [x.requires_grad_() for x in (query, prototypes, values) if x is not None]
    _, lse = retrieval(impl)(*leaves)
    *used, unused = torch.autograd.grad(lse.sum(), leaves, create_graph=create_graph, allow_unused=True)
    assert unused is None
    assert all(bool(gradient.any()) for gradient in used)


@cases("normalize", {one: [("layer",), ("l2",)] for one in (REFERENCE, NATIVE)})
def test_long_rows_are_read_like_short_ones(impl: Impl, normalize: str) -> None:
    for dtype, scale in ((F32, 2.0**70), (F64, 2.0**600)):
        query, prototypes = pair(9, 7, 24, dtype)
        out = hopfield_retrieve(query * scale, prototypes * scale, normalize=normalize, impl=impl)
        short = hopfield_retrieve(query * 2.0**20, prototypes * 2.0**20, normalize=normalize, impl=impl)
        torch.testing.assert_close(out, short)
    query, prototypes = pair(600, 65, 64, torch.bfloat16)  # products of the rows as they are would overflow
    for scale in (2.0**66, 2.0**100):
        out = hopfield_retrieve(query * scale, prototypes * scale, normalize=normalize, impl=impl)
        short = hopfield_retrieve(query * 2.0**20, prototypes * 2.0**20, normalize=normalize, impl=impl)
        torch.testing.assert_close(out, short)
