"""Retrieval from a memory, with MemAE's shrinkage and the entropy of the weights, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.functional import hopfield_retrieve
from anomem.ops import retrieve as ops_retrieve
from anomem.rules import Impl
from anomem.testing import compare, draw, gradients
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
    Function,
    cases,
    each,
    each_dtype,
)

ALL = (REFERENCE, NATIVE, TRITON, TRITON_TF32)
KERNELS = (NATIVE, TRITON, TRITON_TF32)
NORMALIZE = ("none", "layer", "l2")
OPERATORS = torch.ops.anomem


def retrieval(impl: Impl, **options: Any) -> Function:
    """Retrieval with its lse as a function of tensors alone; with `shrink`, with the entropy too."""

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None = None, beta: Tensor | None = None) -> Any:
        given = options if beta is None else {**options, "beta": beta}
        return hopfield_retrieve(
            query, prototypes, values=values, return_lse=True, return_entropy="shrink" in options, impl=impl, **given
        )

    return run


def plain(impl: Impl, **options: Any) -> Function:
    """What an implementation's error is measured in.

    The Triton kernels multiply half-precision rows as the specification does in that dtype. The others compute as the
    documented function does on plain PyTorch: in float32, rounded once.
    """
    if impl != "triton":
        return retrieval("reference", **options)

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None = None, beta: Tensor | None = None) -> Any:
        given = options if beta is None else {**options, "beta": beta}
        found = R.hopfield_retrieve(query, prototypes, values=values, **given)
        return found.out, found.lse

    return run


def check(impl: Impl, inputs: list[Tensor | None], **options: Any) -> None:
    """Results and all gradients, those through lse included, within the budget."""
    compare(retrieval(impl, **options), plain(impl, **options), inputs)


def memory(n: int, m: int, d: int, dv: int = 0, dtype: torch.dtype = F32) -> list[Tensor | None]:
    """query [n, d], prototypes [m, d], values [m, dv] or, where dv is 0, None: the normalised prototypes are read."""
    values = draw(m, dv, dtype=dtype, seed=3) if dv else None
    return [draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2), values]


def pair(n: int, m: int, d: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """query [n, d], prototypes [m, d]."""
    return draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2)


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
        *((dtype, *shape, "layer", 0.2) for dtype, shape in product(dtypes, LONG_ROWS) if dtype != F32),
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


def each_beta(retrieve: Function) -> Function:
    """One memory read with each of several betas, [K]."""

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None, betas: Tensor) -> tuple[Tensor, ...]:
        results = [retrieve(query, prototypes, values, beta) for beta in betas]
        return tuple(torch.stack(result) for result in zip(*results, strict=True))

    return run


@cases("dtype, sizes", {NATIVE: product(NATIVE.dtypes, [(1, 1, 1, 0), (5, 600, 100, 7), (513, 70, 33, 0)])})
def test_sixteen_learned_betas_within_budget(impl: Impl, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """The gradient to one beta is one number, whose error in plain PyTorch may be tiny by chance."""
    betas = torch.linspace(0.1, 1, 16, dtype=F64 if dtype == F64 else F32)
    compare(each_beta(retrieval(impl)), each_beta(plain(impl)), [*memory(*sizes, dtype=dtype), betas])


@cases("dtype, dv", {one: product([t for t in (F32, BF16, F16) if t in one.dtypes], [0, 24]) for one in KERNELS})
def test_learned_betas_of_any_sign_within_budget(impl: Impl, dtype: torch.dtype, dv: int) -> None:
    """And 0. Several memories at once: the gradient to one beta is one number, whose error is luck."""
    count = 6 if impl == "triton" else 32
    betas = draw(count, seed=4)
    betas[0] = 0

    def several(retrieve: Function) -> Function:
        def run(query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor) -> tuple[Tensor, ...]:
            parts = [retrieve(query[i], keys[i], None if values is None else values[i], beta[i]) for i in range(count)]
            return tuple(torch.stack(part) for part in zip(*parts, strict=True))

        return run

    inputs = [
        draw(count, 33, 24, dtype=dtype, seed=1),
        draw(count, 35, 24, dtype=dtype, seed=2),
        draw(count, 35, dv, dtype=dtype, seed=3) if dv else None,
        betas,
    ]
    compare(several(retrieval(impl)), several(plain(impl)), inputs)


@cases(
    "beta, n, m",
    {
        one: [(beta, n, m) for beta in (0.0, -0.5, 0.01, 20.0)]
        for one, n, m in ((NATIVE, 3000, 70), (TRITON, 130, 35), (TRITON_TF32, 130, 35))
    },
)
def test_given_beta_within_budget(impl: Impl, beta: float, n: int, m: int) -> None:
    """Of many queries: a large beta decides between prototypes that are nearly tied, and few such draws are luck."""
    check(impl, memory(n, m, 24), beta=beta)


@cases("beta", {one: [(-100.0,), (3.0,), (100.0,)] for one in KERNELS})
def test_logits_that_overflow_an_exponential_within_budget(impl: Impl, beta: float) -> None:
    """Logits up to 1e5 and down to −1e5, on both sides of what the backward pass makes from lse.

    Of whole numbers, whose products are exact: otherwise rounding decides between prototypes that are nearly tied, and
    the error is luck.
    """
    inputs = [draw(12, 8, scale=10.0).round(), draw(9, 8, seed=2, scale=10.0).round()]
    check(impl, inputs, normalize="none", beta=beta)


@cases("normalize, dv", {NATIVE: [("l2", 0), ("l2", 16), ("layer", 0)]})
def test_sharp_softmaxes_err_as_in_plain_pytorch(impl: Impl, normalize: str, dv: int) -> None:
    """Logits of 1e4, whose rounding decides between near ties: one draw errs 0.1 to 7 times as plain PyTorch.

    The errors of all draws together are compared.
    """
    beta = 1e4 if normalize == "l2" else 100.0
    squares = {impl: 0.0, "reference": 0.0}
    for seed in range(20):
        inputs = [draw(300, 64, seed=5 * seed), draw(64, 64, seed=5 * seed + 1)]
        inputs += [draw(64, dv, seed=5 * seed + 2)] if dv else []
        exact = gradients(retrieval("reference", normalize=normalize, beta=beta), [x.double() for x in inputs])[2]
        for name in squares:
            dquery = gradients(retrieval(name, normalize=normalize, beta=beta), inputs)[2]  # type: ignore[arg-type]
            squares[name] += float((dquery.double() - exact).square().sum())
    assert squares[impl] < 1.6**2 * squares["reference"]


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


@cases("normalize", {one: [("layer",), ("none",)] for one in KERNELS})
def test_two_steps_within_budget(impl: Impl, normalize: str) -> None:
    check(impl, memory(40, 70 if impl == "native" else 35, 24, 5), steps=2, normalize=normalize, beta=0.3)
    check(impl, memory(17, 35, 24, 16), steps=2, normalize=normalize, beta=0.5)


@each(NATIVE)
def test_a_learned_beta_of_two_steps_within_budget(impl: Impl) -> None:
    for normalize in ("layer", "none"):
        check(impl, [*memory(40, 70, 24, 5), torch.tensor(0.3)], steps=2, normalize=normalize)


@each_dtype(NATIVE, among=(F32, BF16))
def test_kept_weights_within_budget(impl: Impl, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass recomputes the weights of no, some or all chunks of queries; what is kept is bounded."""
    for most in (0, 200 * 96 * dtype.itemsize, 2**30):
        monkeypatch.setattr(ops_retrieve, "KEPT_BYTES", most)
        saved: list[Tensor] = []
        query, prototypes = draw(260, 40, dtype=dtype, seed=1), draw(70, 40, dtype=dtype, seed=2)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=saved: to.append(x) or x, lambda x: x):
            hopfield_retrieve(query.requires_grad_(), prototypes, impl=impl)
        kept = [x for x in saved if x.shape[-1] == 96]
        assert sum(x.nbytes for x in kept) == min(most, 260 * 96 * dtype.itemsize)
        check(impl, memory(260, 70, 40, dtype=dtype))
        check(impl, memory(300, 70, 33, 24, dtype=dtype), normalize="none", beta=0.7)


@each_dtype(NATIVE, among=(F32, BF16))
def test_the_last_kept_weights_within_budget(impl: Impl, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the backward pass end elsewhere than those of the forward pass, which once kept whole ones only."""
    monkeypatch.setattr(ops_retrieve, "KEPT_BYTES", 170 * 928 * dtype.itemsize)
    check(impl, memory(2020, 920, 24, dtype=dtype))


@cases("d, normalize, beta", {NATIVE: [(3, "l2", 1e4), (3, "layer", 10.0), (8, "l2", 100.0)]})
def test_crowded_bfloat16_prototypes_err_as_in_plain_pytorch(impl: Impl, d: int, normalize: str, beta: float) -> None:
    """Of few features: their differences are small beside them, and the gradients erred 3 to 19 times as much."""
    inputs = pair(300, 3000, d, BF16)
    run, reference = (retrieval(name, normalize=normalize, beta=beta) for name in (impl, "reference"))  # type: ignore[arg-type]
    results = gradients(run, inputs), gradients(reference, inputs), gradients(reference, [x.double() for x in inputs])
    for actual, baseline, exact in zip(*(result[2:] for result in results), strict=True):
        assert (actual.double() - exact).norm() < 1.5 * (baseline.double() - exact).norm()


@each(NATIVE)
def test_products_of_bfloat16_without_the_library_of_torch(impl: Impl) -> None:
    """oneDNN refuses bfloat16 where it is switched off; the kernels' own products then take its place."""
    inputs = memory(260, 70, 40, dtype=BF16)
    for on in (True, False, True):
        with torch.backends.mkldnn.flags(enabled=on):
            check(impl, inputs)


@cases("normalize", {NATIVE: [("layer",), ("l2",), ("none",)]})
def test_bfloat16_rows_with_a_large_mean_within_budget(impl: Impl, normalize: str) -> None:
    """Their scores are made from the rows as they are only where subtracting the means loses no digits."""
    query, prototypes = draw(260, 40, seed=1), draw(70, 40, seed=2)
    query[100:140] += 30
    query[200], query[201, :20] = 0, 1e-3
    for shift in (0, 30):
        keys = prototypes + shift
        keys[3] = 0
        beta = 1.0 if normalize == "l2" else 0.02
        check(impl, [query.to(BF16), keys.to(BF16)], normalize=normalize, beta=beta)


@each(NATIVE)
def test_a_call_without_gradients_takes_no_autograd_function(impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    query, prototypes = draw(8, 16, seed=1), draw(9, 16, seed=2)
    expected = hopfield_retrieve(query.clone().requires_grad_(), prototypes, impl=impl)
    monkeypatch.setattr(ops_retrieve._Retrieve, "apply", None)
    assert torch.equal(hopfield_retrieve(query, prototypes, impl=impl), expected)
    with torch.no_grad():
        assert torch.equal(hopfield_retrieve(query.requires_grad_(), prototypes, impl=impl), expected)
    with pytest.raises(TypeError):
        hopfield_retrieve(query, prototypes, impl=impl)


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


@cases("n, m", {NATIVE: [(64, 8192)], TRITON: [(32, 1024)], TRITON_TF32: [(32, 1024)]})
def test_rounding_does_not_grow_with_the_memory(impl: Impl, n: int, m: int) -> None:
    """Read from 8192 prototypes in one chain a value had eight times plain PyTorch's error, growing with √M."""
    query, prototypes = pair(n, m, 16)
    upstream = draw(n, 16, seed=4)

    def both_passes(name: Impl, dtype: torch.dtype) -> Tensor:
        leaf = query.to(dtype).requires_grad_()
        out = hopfield_retrieve(leaf, prototypes.to(dtype), impl=name)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(dtype))
        return torch.stack([out.detach(), gradient]).double()

    exact = both_passes("reference", F64)
    kernel, plain_error = ((both_passes(i, F32) - exact).square().mean((1, 2)).sqrt() for i in (impl, "reference"))
    assert bool((kernel <= 1.5 * plain_error).all()), (kernel, plain_error)


@cases(
    "n, m, d, dv, spread",
    {
        NATIVE: [(300, 90, 33, dv, spread) for dv in (0, 9) for spread in (0.3, 0.03, 0.01)],
        TRITON: [
            # At 0.01 plain bfloat16's own error is 30 to 180 times the gradient: it measures nothing.
            *((60, 40, 33, 0, spread) for spread in (0.3, 0.03)),
            *((60, 40, 33, 9, spread) for spread in (0.3, 0.03, 0.01)),
        ],
    },
)
def test_bfloat16_prototypes_that_are_nearly_one_within_budget(
    impl: Impl, n: int, m: int, d: int, dv: int, spread: float
) -> None:
    """A collapsed memory: its gradient to the queries is what is left where nearly equal prototypes cancel.

    With their mean among what is rounded it was off by 20% and more. Without lse, whose gradient is the mean itself.
    """
    query, prototypes, values = memory(n, m, d, dv, BF16)
    assert prototypes is not None
    prototypes = (draw(d, seed=7) + spread * prototypes.float()).bfloat16()
    inputs = [query, prototypes, values]
    compare(
        lambda *x: retrieval(impl, beta=0.7)(*x)[0],
        lambda *x: plain(impl, beta=0.7)(*x)[0],
        inputs,
    )
    check(impl, inputs, beta=0.7)


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


@cases(
    "dtype, sizes",
    {
        NATIVE: product(
            NATIVE.dtypes,
            [(0, 3, 7, 0), (1, 1, 1, 0), (5, 600, 64, 7), (513, 70, 100, 0), (513, 3, 7, 33), (1100, 70, 64, 5)],
        )
    },
)
def test_shrunk_within_budget(impl: Impl, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """No threshold, then 1/(2M) and MemAE's 1/M and 3/M. A learned beta is gradcheck's."""
    m = sizes[1]
    for shrink in (0.0, 0.5 / m, min(0.9, 1 / m), min(0.9, 3 / m)):
        check(impl, memory(*sizes, dtype=dtype), normalize="layer", beta=0.35, shrink=shrink)


@cases("normalize, shrink", {one: product(["l2", "none"], [0.0, 0.1]) for one in (REFERENCE, NATIVE)})
def test_derivatives_of_a_shrunk_retrieval_with_values(impl: Impl, normalize: str, shrink: float) -> None:
    leaves = [x.requires_grad_() for x in (*memory(3, 5, 6, 4, F64), torch.tensor(0.35, dtype=F64)) if x is not None]
    assert torch.autograd.gradcheck(retrieval(impl, normalize=normalize, shrink=shrink), leaves)
    assert torch.autograd.gradgradcheck(retrieval(impl, normalize=normalize, shrink=shrink), leaves)


@each(REFERENCE, NATIVE)
def test_no_threshold_is_the_plain_retrieval(impl: Impl) -> None:
    inputs = [*memory(60, 40, 24, 9), torch.tensor(0.35)]
    shrunk = retrieval(impl, shrink=0.0)(*inputs)[:2]
    for got, expected in zip(shrunk, retrieval(impl)(*inputs), strict=True):
        assert torch.equal(got, expected)


@cases("dtype, m", {one: product((F32, BF16), (3, 7, 20, 49, 96, 1000)) for one in (REFERENCE, NATIVE)})
def test_weights_at_the_threshold_are_on_one_side_in_both_passes(impl: Impl, dtype: torch.dtype, m: int) -> None:
    """Uniform weights are exactly MemAE's threshold 1/M: what the forward pass does not read has no gradient."""
    query, prototypes = pair(50, m, 24, dtype)
    leaves = [query.requires_grad_(), torch.ones(m, 1, dtype=dtype, requires_grad=True)]
    options = {"values": leaves[1], "beta": 1e-9, "shrink": 1 / m, "return_entropy": True}
    out, entropy = hopfield_retrieve(query, prototypes, impl=impl, **options)
    dquery, dvalues = torch.autograd.grad(out.sum(), leaves)
    assert set(out.flatten().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(dvalues.sum(), out.sum(), rtol=0.02, atol=0)
    assert bool((entropy[out[:, 0] == 0] == 0).all())
    assert float(dquery.abs().max()) < 1e-3


@cases("dtype, m", {one: product((F32, BF16, F64), (6, 7, 10, 17, 21)) for one in (REFERENCE, NATIVE)})
def test_a_differentiable_gradient_keeps_the_weights_that_were_read(impl: Impl, dtype: torch.dtype, m: int) -> None:
    """Weights at the threshold: uniform ones, and one of a row that is the threshold to the last bit."""
    (query, prototypes), values = pair(6, m, 24, dtype), draw(m, 3, dtype=dtype, seed=3)
    weights = R.hopfield_retrieve(query.float(), prototypes.float(), normalize="l2").weights
    for keys, shrink in ((prototypes[:1].repeat(m, 1), 1 / m), *((prototypes, float(w)) for w in weights.amax(1))):
        gradients = []
        for create_graph in (False, True):
            leaves = [x.clone().requires_grad_() for x in (query, keys, values)]
            out = hopfield_retrieve(leaves[0], leaves[1], values=leaves[2], shrink=shrink, normalize="l2", impl=impl)
            gradients.append(torch.autograd.grad(out.sum(), leaves, create_graph=create_graph)[2])
        torch.testing.assert_close(*gradients)


@each(REFERENCE, NATIVE)
def test_entropy_lies_between_none_and_uniform(impl: Impl) -> None:
    query, prototypes = pair(60, 40, 24)
    for beta, expected in ((0.0, torch.tensor(40.0).log()), (1e6, torch.tensor(0.0))):
        *_, entropy = hopfield_retrieve(query, prototypes, beta=beta, return_entropy=True, impl=impl)
        torch.testing.assert_close(entropy, expected.expand(60))


@each(REFERENCE, NATIVE)
def test_a_query_whose_weights_all_vanish_reads_nothing(impl: Impl) -> None:
    query, prototypes = pair(6, 40, 24)
    query.requires_grad_()
    out, _, entropy = retrieval(impl, shrink=0.5)(query, prototypes, None, torch.tensor(0.0))
    assert not out.any()
    assert not entropy.any()
    (gradient,) = torch.autograd.grad(out.sum() + entropy.sum(), query)
    assert not gradient.any()


@cases("bad", {one: [(torch.nan,), (torch.inf,)] for one in (REFERENCE, NATIVE)})
def test_a_bad_query_spoils_its_own_shrunk_row_only(impl: Impl, bad: float) -> None:
    query, prototypes = pair(20, 9, 8)
    query[7, 3] = bad
    out, lse, entropy = retrieval(impl, shrink=0.05)(query, prototypes, None, torch.tensor(0.35))
    rows = torch.arange(20) == 7
    assert torch.equal(out.isnan().all(dim=1), rows)
    assert torch.equal(lse.isnan(), rows)
    assert bool(entropy[~rows].isfinite().all())


@each_dtype(*KERNELS)
def test_gradients_from_some_of_the_queries_are_rejected(impl: Impl, dtype: torch.dtype) -> None:
    """A kernel whose memory's gradient stops at half of the queries does not keep the budget."""

    def half(query: Tensor, prototypes: Tensor) -> Tensor:
        first, second = query.split(16)
        return torch.cat([retrieval(impl)(first, prototypes)[0], retrieval(impl)(second, prototypes.detach())[0]])

    with pytest.raises(AssertionError, match="result 2: error"):
        compare(half, lambda q, k: plain(impl)(q, k)[0], memory(32, 24, 16, dtype=dtype)[:2])


@cases("create_graph", {one: [(False,), (True,)] for one in ALL})
def test_values_that_were_not_used_have_no_gradient(impl: Impl, create_graph: bool) -> None:
    """None as of any unused parameter: an optimizer's weight decay would move one whose gradient is zero."""
    query, prototypes, values, _ = (*memory(7, 5, 16, 3), None)
    leaves = [x.requires_grad_() for x in (query, prototypes, values) if x is not None]
    _, lse = retrieval(impl)(*leaves)
    *used, unused = torch.autograd.grad(lse.sum(), leaves, create_graph=create_graph, allow_unused=True)
    assert unused is None
    assert all(bool(gradient.any()) for gradient in used)


@cases("normalize, scale", {one: product(["layer", "l2"], [1e20, 1e30]) for one in KERNELS})
def test_rows_whose_squares_overflow_within_budget(impl: Impl, normalize: str, scale: float) -> None:
    query, prototypes = pair(17, 35, 24)
    check(impl, [query * scale, prototypes * scale], normalize=normalize)
    query[3] = query[3, 0]  # no variance
    for result in gradients(retrieval(impl, normalize=normalize), [query * scale, prototypes * scale]):
        assert bool(result.isfinite().all())


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
