"""Retrieval in float32 over the whole range of its numbers, at sizes where products come from torch's library.

On processors with tiles a product takes its numbers apart into three of bfloat16, which holds for a part of that range.
"""

from __future__ import annotations

import pytest
import torch

from anomem.functional import hopfield_retrieve
from anomem.rules import Impl
from anomem.testing import draw
from tests.operators.contract import NATIVE, cases
from tests.operators.retrieve_calls import check, memory, pair


@cases("scale", {NATIVE: [(1e-36,), (1e-28,), (1e-22,), (1e22,), (1e30,), (1e36,)]})
def test_small_beside_large_numbers_within_budget(impl: Impl, scale: float) -> None:
    """Queries by a scale, prototypes by its inverse: the logits are those of a scale of 1."""
    query, prototypes = pair(260, 70, 40)
    values = draw(70, 24, seed=3)
    check(impl, [query * scale, prototypes / scale, values], normalize="none", beta=0.2)


@cases("size", {NATIVE: [(1.0e9,), (1.1e9,), (1e30,), (3.4e38,)]})
def test_a_large_element_beside_small_ones_within_budget(impl: Impl, size: float) -> None:
    """The largest one would be infinite in bfloat16; what it multiplies is below the range of bfloat16's parts."""
    query, prototypes = pair(260, 70, 40)
    query[100, 7] = size
    prototypes[:, 7] /= size
    check(impl, [query, prototypes, draw(70, 24, seed=3)], normalize="none", beta=0.2)


@cases("beta", {NATIVE: [(30.0,), (100.0,)]})
def test_weights_below_the_smallest_normal_number_within_budget(impl: Impl, beta: float) -> None:
    """Of whole numbers, whose products are exact: no rounding decides between near ties."""
    query, prototypes = (x.round() for x in pair(600, 70, 24))
    check(impl, [query, prototypes, None], normalize="none", beta=beta)


@cases("value", {NATIVE: [(float("nan"),), (float("inf"),), (float("-inf"),)]})
def test_a_query_that_is_not_finite_spoils_no_other(impl: Impl, value: float) -> None:
    query, prototypes = pair(400, 70, 40)
    broken = query.clone()
    broken[130, 5] = value
    others = torch.arange(400) != 130

    def both_passes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = rows.clone().requires_grad_()
        out = hopfield_retrieve(leaf, prototypes, normalize="none", beta=0.2, impl=impl)
        return out.detach(), torch.autograd.grad(out[others].sum(), leaf)[0]

    for clean, spoilt in zip(both_passes(query), both_passes(broken), strict=True):
        assert not torch.equal(clean[130], spoilt[130]) or not clean[130].any()
        torch.testing.assert_close(spoilt[others], clean[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(260, 513, 33, 0), (300, 1100, 64, 24), (2100, 70, 520, 0), (130, 4100, 70, 9)])
def test_sums_longer_than_a_chain_within_budget(sizes: tuple[int, int, int, int]) -> None:
    check("native", memory(*sizes), beta=0.3)
