"""Native retrieval with MemAE's hard shrinkage and with the entropy of its weights, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.functional import hopfield_retrieve
from anomem.testing import compare, draw, gradients
from tests.native.invariances import assert_compiles_for_any_number_of_rows, assert_same_bits_with_any_number_of_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(0, 3, 7, 0), (1, 1, 1, 0), (5, 600, 64, 7), (513, 70, 100, 0), (513, 3, 7, 33), (1100, 70, 64, 5)]


def read(impl: str, **options: Any) -> Any:
    """Shrunk retrieval with lse and entropy as a function of tensors alone."""

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None = None, beta: Tensor | None = None) -> Any:
        arguments = {"beta": beta, **options} if beta is not None else options
        return hopfield_retrieve(
            query, prototypes, values=values, return_lse=True, return_entropy=True, impl=impl, **arguments
        )

    return run


def tensors(n: int, m: int, d: int, dv: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """query [n, d], prototypes [m, d], values [m, dv] or None, a learned beta."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = draw(m, dv, dtype=dtype, seed=3) if dv else None
    beta = torch.tensor(0.35, dtype=wide)
    return [draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2), values, beta]


def thresholds(m: int) -> list[float]:
    """Off; MemAE's 1/M and 3/M."""
    return [0.0, 0.5 / m, min(0.9, 1 / m), min(0.9, 3 / m)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """With a beta that is not learned: `test_gradcheck` holds the gradient to one."""
    *inputs, _ = tensors(*shape, dtype=dtype)
    for shrink in thresholds(shape[1]):
        options = {"normalize": "layer", "beta": 0.35, "shrink": shrink}
        compare(read("native", **options), read("reference", **options), inputs)


@pytest.mark.parametrize("shrink", [0.0, 0.1])
@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_gradcheck(normalize: str, shrink: float) -> None:
    leaves = [x if x is None else x.requires_grad_() for x in tensors(3, 5, 6, 4, torch.float64)]
    assert torch.autograd.gradcheck(read("native", normalize=normalize, shrink=shrink), leaves)
    assert torch.autograd.gradgradcheck(read("native", normalize=normalize, shrink=shrink), leaves)


@pytest.mark.parametrize("shrink", [0.0, 0.02])
def test_same_bits_with_any_number_of_threads(shrink: float) -> None:
    inputs = tensors(1300, 70, 24, 9)
    assert_same_bits_with_any_number_of_threads(lambda: gradients(read("native", shrink=shrink), inputs))


def test_no_threshold_is_the_plain_retrieval() -> None:
    query, prototypes, values, beta = tensors(60, 40, 24, 9)
    plain = hopfield_retrieve(query, prototypes, values=values, beta=beta, return_lse=True, impl="native")
    assert all(
        torch.equal(x, y)
        for x, y in zip(plain, read("native")(query, prototypes, values, beta)[:2], strict=True)
    )  # fmt: skip


def test_entropy_lies_between_none_and_uniform() -> None:
    query, prototypes, _, _ = tensors(60, 40, 24, 0)
    for beta, expected in ((0.0, torch.tensor(40.0).log()), (1e6, torch.tensor(0.0))):
        *_, entropy = hopfield_retrieve(query, prototypes, beta=beta, return_entropy=True, impl="native")
        *_, plain = hopfield_retrieve(query, prototypes, beta=beta, return_entropy=True, impl="reference")
        torch.testing.assert_close(plain, expected.expand(60))
        torch.testing.assert_close(entropy, expected.expand(60))


def test_a_query_whose_weights_all_vanish_reads_nothing() -> None:
    query, prototypes, _, _ = tensors(6, 40, 24, 0)
    query.requires_grad_()
    out, _, entropy = read("native", shrink=0.5)(query, prototypes, None, torch.tensor(0.0))
    assert not out.any()
    assert not entropy.any()
    (gradient,) = torch.autograd.grad(out.sum() + entropy.sum(), query)
    assert not gradient.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_spoils_its_own_row_only(bad: float) -> None:
    query, prototypes, _, beta = tensors(20, 9, 8, 0)
    query[7, 3] = bad
    for impl in ("native", "reference"):
        out, lse, entropy = read(impl, shrink=0.05)(query, prototypes, None, beta)
        rows = torch.arange(20) == 7
        assert torch.equal(out.isnan().all(dim=1), rows), impl
        assert torch.equal(lse.isnan(), rows), impl
        assert bool(entropy[~rows].isfinite().all()), impl


def test_opcheck() -> None:
    query, prototypes, values, beta = tensors(6, 5, 4, 3)
    operators = torch.ops.anomem
    read("native")(query, prototypes)
    arguments = (query, prototypes, values, beta, 0.5, 1, 0.1)
    torch.library.opcheck(operators.native_shrink_fwd.default, arguments)
    results = operators.native_shrink_fwd(*arguments)
    upstream = tuple(torch.ones_like(x) for x in results)
    torch.library.opcheck(operators.native_shrink_bwd.default, (*upstream, *arguments, *results))


def test_compiles_in_one_graph_with_any_number_of_queries() -> None:
    def loss(query: Tensor, prototypes: Tensor) -> Tensor:
        out, entropy = hopfield_retrieve(query, prototypes, shrink=0.02, return_entropy=True, impl="native")
        return (out**2).sum() + entropy.sum()

    assert_compiles_for_any_number_of_rows(loss, draw(9, 8, seed=2))


def test_vmap_and_errors() -> None:
    query, prototypes = draw(3, 6, 4, seed=1), draw(5, 4, seed=2)
    mapped = torch.func.vmap(lambda q: hopfield_retrieve(q, prototypes, shrink=0.1, impl="native"))(query)
    assert torch.equal(mapped, hopfield_retrieve(query, prototypes, shrink=0.1, impl="native"))
    with pytest.raises(ArgumentError, match=r"impl.*float16"):
        hopfield_retrieve(query.half(), prototypes.half(), shrink=0.1, impl="native")
