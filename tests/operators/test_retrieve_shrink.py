"""Retrieval with MemAE's shrinkage and the entropy of the weights; `TestShrunk` holds it to the contract."""

from __future__ import annotations

from itertools import product

import torch

from anomem import reference as R
from anomem.functional import hopfield_retrieve
from anomem.rules import Impl
from anomem.testing import draw
from tests.operators.contract import BF16, F32, F64, NATIVE, REFERENCE, cases, each
from tests.operators.retrieve_calls import check, memory, pair, retrieval


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


@each(NATIVE)
def test_both_passes_cut_the_same_weights_beside_a_large_query(impl: Impl) -> None:
    """Chunks of the passes differ in length; a large query in a chunk made other products of its neighbours."""
    slots, d, chunk = 600, 64, 252
    common = draw(1, d, seed=1)
    query = 3 * common + 0.1 * draw(10 * chunk, d, seed=2)
    query[130::chunk] = 1e11
    prototypes = common + 3e-3 * draw(slots, d, seed=3)
    values = torch.eye(slots).requires_grad_()
    options = {"normalize": "none", "beta": 1.0, "shrink": 1 / slots, "return_entropy": True, "impl": impl}
    out, _ = hopfield_retrieve(query, prototypes, values=values, **options)
    rows = torch.cat([torch.arange(126) + chunk * k for k in range(10)])[:slots]
    upstream = torch.zeros_like(out)
    upstream[rows, torch.arange(slots)] = 1
    (of_values,) = torch.autograd.grad(out, values, upstream)  # its columns are the weights of these rows
    assert torch.equal(of_values.T == 0, out.detach()[rows] == 0)
