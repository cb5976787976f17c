"""Retrieval within the error budget where rounding is hardest: large betas, near ties, long sums; wrong gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from anomem.functional import hopfield_retrieve
from anomem.ops import retrieve as ops_retrieve
from anomem.rules import Impl
from anomem.testing import compare, draw, error, gradients
from tests.operators.contract import BF16, F16, F32, F64, NATIVE, TRITON, TRITON_TF32, Function, cases, each, each_dtype
from tests.operators.retrieve_calls import KERNELS, check, memory, pair, plain, retrieval


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


@each_dtype(*KERNELS)
def test_gradients_from_some_of_the_queries_are_rejected(impl: Impl, dtype: torch.dtype) -> None:
    """A kernel whose memory's gradient stops at half of the queries does not keep the budget."""

    def half(query: Tensor, prototypes: Tensor) -> Tensor:
        first, second = query.split(16)
        return torch.cat([retrieval(impl)(first, prototypes)[0], retrieval(impl)(second, prototypes.detach())[0]])

    with pytest.raises(AssertionError, match="result 2: error"):
        compare(half, lambda q, k: plain(impl)(q, k)[0], memory(32, 24, 16, dtype=dtype)[:2])


@cases("normalize, scale", {one: product(["layer", "l2"], [1e20, 1e30]) for one in KERNELS})
def test_rows_whose_squares_overflow_within_budget(impl: Impl, normalize: str, scale: float) -> None:
    query, prototypes = pair(17, 35, 24)
    check(impl, [query * scale, prototypes * scale], normalize=normalize)
    query[3] = query[3, 0]  # no variance
    for result in gradients(retrieval(impl, normalize=normalize), [query * scale, prototypes * scale]):
        assert bool(result.isfinite().all())


@each(NATIVE)
def test_sums_of_many_equal_weights_keep_their_digits(impl: Impl) -> None:
    """One chain of float32 sums lost two digits of the entropy, and one of the output."""
    query, prototypes = torch.zeros(8, 16), draw(30_000, 16)
    options = {"normalize": "none", "shrink": 0.5 / len(prototypes), "return_entropy": True}
    actual = hopfield_retrieve(query, prototypes, impl=impl, **options)
    exact = hopfield_retrieve(query.double(), prototypes.double(), impl="reference", **options)
    assert all(error(one, other) < 3e-6 for one, other in zip(actual, exact, strict=True))
