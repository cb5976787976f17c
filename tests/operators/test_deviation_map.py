"""The map of distances between features and what the memory returns, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from anomem.functional import deviation_map
from anomem.rules import Impl
from anomem.testing import draw
from tests.operators.contract import (
    F32,
    NATIVE,
    REFERENCE,
    Contract,
    assert_same_values,
    cases,
    compare_values,
    each,
    each_dtype,
)

ALL = (REFERENCE, NATIVE)
NORMALIZE = ("layer", "l2", "none")
DISTANCES = ("cosine", "l2")


def check(impl: Impl, *tensors: Tensor | None, **options: Any) -> None:
    """The map of feature_map, prototypes, values and log_prior within the budget."""

    def run(
        name: Impl, feature_map: Tensor, prototypes: Tensor, values: Tensor | None = None, prior: Tensor | None = None
    ) -> Tensor:
        return deviation_map(feature_map, prototypes, values=values, log_prior=prior, impl=name, **options)

    compare_values(run, impl, tensors)


class TestDeviationMap(Contract):
    """Rows are images."""

    implementations = ALL
    differentiable = False
    mapped = False

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 6, 3, 4, dtype=dtype), draw(4, 6, dtype=dtype, seed=1)]

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        return [torch.tensor(0.4)]

    def call(self, impl: Impl, *inputs: Any) -> Tensor:
        feature_map, prototypes, *beta = inputs
        return deviation_map(feature_map, prototypes, beta=beta[0] if beta else None, impl=impl)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        feature_map, prototypes = self.inputs(2)
        for values, beta, prior in ((None, None, None), (prototypes, torch.tensor(0.4), draw(12, 4))):
            arguments = (feature_map, prototypes, values, beta, 0.5, 1, 0, prior)
            yield torch.ops.anomem.native_deviation_map, arguments


# B, d, H, W, M: tails of the vectors, the panels, the register blocks and the chunks of positions.
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 5, 3), (3, 33, 6, 7, 70), (1, 64, 32, 32, 9)]


@cases("dtype, distance, normalize, shape", {NATIVE: product(NATIVE.dtypes, DISTANCES, NORMALIZE, SHAPES)})
def test_map_within_budget(
    impl: Impl, dtype: torch.dtype, distance: str, normalize: str, shape: tuple[int, int, int, int, int]
) -> None:
    batch, d, height, width, m = shape
    feature_map, prototypes = draw(batch, d, height, width, dtype=dtype), draw(m, d, dtype=dtype, seed=1)
    check(impl, feature_map, prototypes, normalize=normalize, distance=distance, beta=0.7)


@cases("dtype, distance", {NATIVE: product(NATIVE.dtypes, DISTANCES)})
def test_map_with_values_and_a_prior_within_budget(impl: Impl, dtype: torch.dtype, distance: str) -> None:
    feature_map, prototypes = draw(2, 20, 4, 5, dtype=dtype), draw(37, 20, dtype=dtype, seed=1)
    values, prior = draw(37, 20, dtype=dtype, seed=2), draw(20, 37, seed=3).log_softmax(dim=1)
    prior[:, 5] = -torch.inf  # a prototype that is never there
    check(impl, feature_map, prototypes, values, prior, distance=distance)


@each_dtype(*ALL, among=(F32,))
def test_map_from_any_layout(impl: Impl, dtype: torch.dtype) -> None:
    feature_map, prototypes = draw(2, 20, 4, 5, dtype=dtype), draw(9, 20, dtype=dtype, seed=1)
    expected = deviation_map(feature_map, prototypes, impl=impl)
    for same in (
        feature_map.contiguous(memory_format=torch.channels_last),
        feature_map.transpose(2, 3).contiguous().transpose(2, 3),
        torch.nn.functional.pad(feature_map, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    ):
        assert_same_values([deviation_map(same, prototypes, impl=impl)], [expected], impl)


@cases("batch", {NATIVE: [(0,), (2,)]})
def test_empty_map_and_learned_beta_within_budget(impl: Impl, batch: int) -> None:
    check(impl, draw(batch, 6, 3, 3), draw(4, 6, seed=1), beta=torch.tensor(0.4))


@each(NATIVE)
def test_zero_features_under_l2(impl: Impl) -> None:
    feature_map, prototypes = draw(1, 6, 3, 3), draw(4, 6, seed=1)
    feature_map[0, :, 1, 1], prototypes[2] = 0, 0
    for distance in DISTANCES:
        check(impl, feature_map, prototypes, normalize="l2", distance=distance)


@cases("bad, normalize", {one: product([torch.nan, torch.inf], NORMALIZE) for one in ALL})
def test_a_bad_feature_spoils_its_own_position_only(impl: Impl, bad: float, normalize: Any) -> None:
    feature_map, prototypes = draw(2, 6, 3, 3), draw(4, 6, seed=1)
    feature_map[1, 2, 0, 1] = bad
    got, expected = (deviation_map(feature_map, prototypes, normalize=normalize, impl=i) for i in (impl, "reference"))
    assert torch.equal(got.isnan(), expected.isnan())
    assert int(got.isnan().sum()) == 1


@each(*ALL)
def test_a_position_does_not_see_the_others(impl: Impl) -> None:
    """Images in another order give their maps in that order."""
    feature_map, prototypes, order = draw(5, 6, 3, 3), draw(4, 6, seed=1), torch.randperm(5)
    expected = deviation_map(feature_map, prototypes, impl=impl)[order]
    torch.testing.assert_close(deviation_map(feature_map[order], prototypes, impl=impl), expected)


@cases("shape", {one: [((0, 4, 2, 2),), ((2, 4, 0, 2),), ((2, 4, 2, 0),)] for one in ALL})
def test_a_map_of_no_positions(impl: Impl, shape: tuple[int, ...]) -> None:
    result = deviation_map(draw(*shape), draw(3, 4, seed=1), impl=impl)
    assert result.shape == (shape[0], *shape[2:])


@cases("normalize", {one: [("layer",), ("l2",)] for one in ALL})
def test_features_whose_squares_overflow(impl: Impl, normalize: Any) -> None:
    feature_map, prototypes = draw(2, 6, 3, 4), draw(4, 6, seed=1)
    expected = deviation_map(feature_map * 2.0**20, prototypes, normalize=normalize, impl=impl)
    for layout in (torch.contiguous_format, torch.channels_last):
        long = (feature_map * 2.0**70).contiguous(memory_format=layout)
        torch.testing.assert_close(deviation_map(long, prototypes, normalize=normalize, impl=impl), expected)
