"""The tester is tested: the budget must reject every known-wrong result, and accept the right one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomem import reference as R
from anomem.testing import assert_within_budget, compare, draw

TAU = 0.2


def right(z: Tensor, z_pair: Tensor) -> Tensor:
    return R.nt_xent_rows(z, z_pair, TAU)


def diagonal_left_in(z: Tensor, z_pair: Tensor) -> Tensor:
    unit = R.l2_normalize(torch.cat([z, z_pair], dim=1))
    return R.contrast_rows(unit, unit, torch.arange(unit.shape[1]).roll(z.shape[1]), None, TAU)


def wrong_temperature(z: Tensor, z_pair: Tensor) -> Tensor:
    return R.nt_xent_rows(z, z_pair, TAU * 1.001)


def dropped_tail(z: Tensor, z_pair: Tensor) -> Tensor:
    rows = right(z, z_pair)
    return torch.cat([rows[:, :-1], torch.zeros_like(rows[:, -1:])], dim=1)


def zeros(z: Tensor, z_pair: Tensor) -> Tensor:
    return 0 * right(z, z_pair)


def detached_positive(z: Tensor, z_pair: Tensor) -> Tensor:
    return R.nt_xent_rows(z, z_pair.detach(), TAU) + 0 * z_pair.sum()


def views() -> list[Tensor]:
    return [draw(2, 9, 16), draw(2, 9, 16, seed=1)]


def test_the_reference_passes() -> None:
    compare(right, right, views())


@pytest.mark.parametrize("wrong", [diagonal_left_in, wrong_temperature, dropped_tail, zeros, detached_positive])
def test_known_wrong_losses_are_rejected(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="budget"):
        compare(wrong, right, views())


def test_float64_is_held_to_its_own_precision() -> None:
    inputs = [x.double() for x in views()]
    compare(right, right, inputs)
    with pytest.raises(AssertionError, match="budget"):
        compare(lambda *z: right(*(x.float() for x in z)).double(), right, inputs)
    with pytest.raises(AssertionError, match="budget"):
        compare(lambda *z: right(*z) * (1 + 1e-13), right, inputs)


def retrieve(query: Tensor, keys: Tensor) -> Tensor:
    return R.hopfield_retrieve(query, keys).out


def keys_from_one_split(query: Tensor, keys: Tensor) -> Tensor:
    """The value is right; the memory's gradient comes from the first half of the queries only."""
    half = query.shape[0] // 2
    return torch.cat([retrieve(query[:half], keys), retrieve(query[half:], keys.detach())])


def dropped_prototype_tile(query: Tensor, keys: Tensor) -> Tensor:
    return retrieve(query, keys[:-1]) + 0 * keys.sum()


@pytest.mark.parametrize("wrong", [keys_from_one_split, dropped_prototype_tile])
def test_known_wrong_retrievals_are_rejected(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="budget"):
        compare(wrong, retrieve, [draw(32, 16), draw(24, 16, seed=1)])


def test_finite_where_it_should_be_nan_is_rejected() -> None:
    exact = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    with pytest.raises(AssertionError, match="finite"):
        assert_within_budget(torch.tensor([1.0, 2.0]), exact.float(), exact)


def test_wrong_shape_and_dtype_are_rejected() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(torch.ones(3), torch.ones(2), exact)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_within_budget(torch.ones(2, dtype=torch.bfloat16), torch.ones(2), exact)
