"""Retrieval from many prototypes, which the native kernel reads block after block where the processor has tiles.

Everywhere else the same calls take the kernel's other paths.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.functional import hopfield_retrieve
from anomem.nn import HopfieldMemory
from anomem.ops import retrieve as ops_retrieve
from anomem.rules import Impl
from anomem.testing import draw, gradients
from tests.operators.contract import BF16, F32, NATIVE, cases
from tests.operators.retrieve_calls import NORMALIZE, check, memory

SIZES = [
    (1, 512, 16, 0),
    (75, 600, 24, 0),
    (130, 520, 64, 24),
    (400, 1100, 33, 0),
    (2100, 513, 24, 17),
    (300, 2300, 520, 0),
]

SIZES_IN_BFLOAT16 = [
    (64, 512, 32, 0),
    (100, 1600, 33, 17),
    (130, 4100, 64, 24),
    (400, 1600, 33, 0),
    (2100, 1537, 24, 17),
]


def whole(n: int, m: int, d: int, dv: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    """query [n, d], prototypes [m, d], values [m, dv]."""
    return draw(n, d, seed=1, dtype=dtype), draw(m, d, seed=2, dtype=dtype), draw(m, dv, seed=3, dtype=dtype)


@cases("sizes, normalize", {NATIVE: product(SIZES, NORMALIZE)})
def test_many_prototypes_within_budget(impl: Impl, sizes: tuple[int, int, int, int], normalize: str) -> None:
    n, m, d, dv = sizes
    beta = 0.3 if normalize == "none" else 2.0
    check(impl, memory(n, m, d, dv), normalize=normalize, beta=beta * d**-0.5 if normalize == "none" else beta)


@cases("sizes, normalize", {NATIVE: product(SIZES_IN_BFLOAT16, NORMALIZE)})
def test_many_prototypes_in_bfloat16_within_budget(
    impl: Impl, sizes: tuple[int, int, int, int], normalize: str
) -> None:
    beta = 0.3 * sizes[2] ** -0.5 if normalize == "none" else 2.0
    check(impl, memory(*sizes, dtype=BF16), normalize=normalize, beta=beta)


@cases("beta, dtype", {NATIVE: product([-100.0, -2.0, 0.0, 3.0, 100.0], [F32, BF16])})
def test_any_beta_within_budget(impl: Impl, beta: float, dtype: torch.dtype) -> None:
    """Of whole numbers, whose products are exact: no rounding decides between near ties."""
    query, prototypes, values = whole(140, 1601, 16, 17, dtype)
    check(impl, [(3 * query).round(), (3 * prototypes).round(), values], normalize="none", beta=beta)


@cases("dtype, m", {NATIVE: product([F32, BF16], [1601, 1602])})
def test_logits_far_below_zero_within_budget(impl: Impl, dtype: torch.dtype, m: int) -> None:
    """Beside them a score of zero, as columns behind the last one have, has an infinite exponential."""
    query, prototypes, values = whole(140, m, 64, 24, dtype)
    check(impl, [0.1 * query - 1, 0.1 * prototypes + 1, values], normalize="none", beta=2.0)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_values_with_a_common_mean(mean: float) -> None:
    """The gradient of a score is a difference of what they have in common: twice plain PyTorch's error at most, as the
    root of the mean square over 12 draws of queries that are alike."""
    errors = []
    for seed in range(12):
        draws = [draw(*size, seed=4 * seed + i) for i, size in enumerate(((190, 16), (512, 16), (512, 19), (190, 19)))]
        query, prototypes, values, upstream = draws
        given = [query[:1] + 1e-3 * query, prototypes, mean + values]
        upstream = upstream[:1] + 1e-3 * upstream
        found = []
        for impl, dtype in (("native", F32), ("reference", F32), ("reference", torch.float64)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in given]
            out = hopfield_retrieve(leaves[0], leaves[1], values=leaves[2], beta=0.06, normalize="none", impl=impl)
            found.append(torch.autograd.grad(out, leaves[0], upstream.to(dtype))[0].double())
        native, plain, exact = found
        errors.append([(x - exact).square().mean() / exact.square().mean() for x in (native, plain)])
    native_error, plain_error = torch.tensor(errors).mean(0).sqrt()
    assert native_error < 2 * plain_error


def test_products_of_the_library_switched_off_between_the_passes() -> None:
    for dtype, (forward, backward) in product((F32, BF16), ((True, False), (False, True))):
        query, prototypes, _ = whole(200, 1601, 32, 32, dtype)
        gradients = []
        for impl in ("native", "reference"):
            leaves = [x.clone().requires_grad_() for x in (query, prototypes)]
            with torch.backends.mkldnn.flags(enabled=forward):
                out = hopfield_retrieve(*leaves, normalize="l2", impl=impl)
            with torch.backends.mkldnn.flags(enabled=backward):
                gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
        for native, plain in zip(*gradients, strict=True):
            error = 1e-5 if dtype == F32 else 0.1
            torch.testing.assert_close(native, plain, rtol=error, atol=error * float(plain.abs().max()))


def test_a_traced_call() -> None:
    layer, query = HopfieldMemory(32, 600, impl="native"), draw(200, 32)
    traced = torch.jit.trace(layer, query, check_trace=False)
    assert torch.equal(traced(query), layer(query))


@cases("scale", {NATIVE: [(1e-36,), (1e-22,), (1e30,)]})
def test_small_beside_large_numbers_within_budget(impl: Impl, scale: float) -> None:
    query, prototypes, values = whole(140, 600, 40, 24)
    check(impl, [query * scale, prototypes / scale, values], normalize="none", beta=0.2)


@cases("size", {NATIVE: [(1e-30,), (1e-20,), (1e12,)]})
def test_small_and_large_gradients_within_budget(impl: Impl, size: float) -> None:
    """Values and upstream gradients of this size: some of their products are out of the range of tiles."""
    query, prototypes, values = whole(140, 600, 24, 17)
    check(impl, [query, prototypes, values * size], normalize="none", beta=0.2)


@cases("value, dtype", {NATIVE: product([float("nan"), float("inf"), float("-inf")], [F32, BF16])})
def test_a_query_that_is_not_finite_spoils_no_other(impl: Impl, value: float, dtype: torch.dtype) -> None:
    query, prototypes, _ = whole(400, 1600, 24, 24, dtype)
    broken = query.clone()
    broken[130, 5] = value
    others = torch.arange(400) != 130

    def both_passes(rows: Tensor) -> tuple[Tensor, ...]:
        leaf, keys = rows.clone().requires_grad_(), prototypes.clone().requires_grad_()
        out = hopfield_retrieve(leaf, keys, normalize="none", beta=0.2, impl=impl)
        return out.detach(), *torch.autograd.grad(out[others].sum(), (leaf, keys))

    (out, rows, _), (clean_out, clean_rows, _) = both_passes(broken), both_passes(query)
    assert out[130].isnan().all()
    for spoilt, clean in ((out, clean_out), (rows, clean_rows)):
        error = 1e-5 if dtype == F32 else 2e-2
        torch.testing.assert_close(spoilt[others], clean[others], rtol=error, atol=error)


@cases("kept, dtype", {NATIVE: product([0, 126, 200, 399], [F32, BF16])})
def test_what_is_kept_changes_no_result(
    impl: Impl, kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, prototypes, values = whole(400, 1601, 24, 17, dtype)
    upstream = draw(400, 17, seed=4, dtype=dtype)

    def both_passes() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (query, prototypes, values)]
        out = hopfield_retrieve(leaves[0], leaves[1], values=leaves[2], beta=0.2, normalize="none", impl=impl)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    everything = both_passes()
    width, kind = ops_retrieve._kept_row(query, prototypes, values)
    monkeypatch.setattr(ops_retrieve, "KEPT_BYTES", kept * width * kind.itemsize)
    some = both_passes()
    assert torch.equal(some[0], everything[0])
    for one, other in zip(some[1:], everything[1:], strict=True):
        error = 1e-4 if dtype == F32 else 2e-2
        torch.testing.assert_close(one, other, rtol=error, atol=error / 20)


@cases("beta", {NATIVE: [(200.0,), (1e6,)]})
def test_a_weight_of_one_has_no_gradient(impl: Impl, beta: float) -> None:
    """As in the reference, where the weighted mean of dP is that of the one weight."""
    query = draw(140, 16, scale=3.0).round().requires_grad_()
    prototypes = draw(600, 16, seed=2, scale=3.0).round().requires_grad_()
    first, second = (query @ prototypes.T).topk(2).values.unbind(-1)
    sure = first > second
    assert sure.sum() > 50
    out = hopfield_retrieve(query, prototypes, normalize="none", beta=beta, impl=impl)
    upstream = draw(140, 16, seed=3) * sure[:, None]
    (gradient,) = torch.autograd.grad(out, query, upstream)
    assert not gradient.any()


@cases("normalize", {NATIVE: [(name,) for name in NORMALIZE]})
def test_the_output_may_be_changed_in_place(impl: Impl, normalize: str) -> None:
    query, prototypes, _ = whole(140, 600, 24, 24)
    gradients = []
    for changed in (False, True):
        leaf = query.clone().requires_grad_()
        out = hopfield_retrieve(leaf, prototypes, beta=0.2, normalize=normalize, impl=impl)
        result = out.mul_(2) if changed else out * 2
        gradients += torch.autograd.grad(result.sum(), leaf)
    assert torch.equal(*gradients)


@cases("normalize, dtype", {NATIVE: product(NORMALIZE, [F32, BF16])})
def test_the_number_of_threads_changes_no_bit(impl: Impl, normalize: str, dtype: torch.dtype) -> None:
    query, prototypes, values = whole(2500, 1601, 24, 17, dtype)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in (query, prototypes, values)]
            out = hopfield_retrieve(leaves[0], leaves[1], values=leaves[2], beta=0.2, normalize=normalize, impl=impl)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@cases("dv", {NATIVE: [(0,), (17,)]})
def test_learned_beta_and_a_compiled_call_within_budget(impl: Impl, dv: int) -> None:
    """Their backward passes keep nothing and read the weights from lse."""
    check(impl, [*memory(140, 600, 24, dv), torch.tensor(0.4)])
    inputs = [x.requires_grad_() for x in memory(140, 600, 24, dv) if x is not None]

    def both_passes(function: Any) -> tuple[Tensor, ...]:
        values = inputs[2] if dv else None
        out = function(inputs[0], inputs[1], values=values, beta=0.3, impl=impl)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    eager, compiled = both_passes(hopfield_retrieve), both_passes(torch.compile(hopfield_retrieve, backend="aot_eager"))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


PEAKED = [(64, 0.3), (128, 0.15), (192, None), (256, None)]


@cases("d, beta, tied", {NATIVE: [(*one, tied) for one in PEAKED for tied in (True, False)]})
def test_queries_beside_a_prototype_in_bfloat16(impl: Impl, d: int, beta: float | None, tied: bool) -> None:
    """One weight is nearly 1: its gradient is what the rounding of products must not exceed."""
    prototypes, values = draw(1600, d, seed=1, dtype=BF16), draw(1600, d, seed=2, dtype=BF16)
    query = prototypes[:300] + 0.1 * draw(300, d, seed=3, dtype=BF16)
    given = [query, prototypes] if tied else [query, prototypes, values]

    def slope(name: Impl, dtype: torch.dtype) -> Tensor:
        def call(q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
            return hopfield_retrieve(q, k, values=v, beta=beta, normalize="none", impl=name)

        return gradients(call, [x.to(dtype) for x in given])[1].double()

    exact = slope("reference", torch.float64)
    assert float((slope(impl, BF16) - exact).norm()) < 0.03 * float(exact.norm())


@cases("twin", {NATIVE: [(1000,), (10,)]})
def test_two_equal_prototypes_in_bfloat16_within_budget(impl: Impl, twin: int) -> None:
    """They share nearly all of the weight, in the first block or not."""
    query, prototypes, values = whole(140, 1601, 64, 24, BF16)
    prototypes[twin + 1] = prototypes[twin]
    values[twin + 1] = values[twin]
    check(impl, [prototypes[twin] + 0.2 * query, prototypes, values], normalize="none", beta=0.12)


@cases("m, d, dv", {NATIVE: [(1568, 32, 1566), (2048, 64, 2078)]})
def test_what_is_kept_is_told_by_its_dtype(impl: Impl, m: int, d: int, dv: int) -> None:
    """As many numbers are kept of a query in blocks as weights would be."""
    check(impl, memory(130, m, d, dv, dtype=BF16), normalize="layer", beta=0.5)
