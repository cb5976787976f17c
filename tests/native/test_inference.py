"""Native deviation map and usage of a memory on the CPU against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.functional import deviation_map, hopfield_retrieve, memory_diagnostics
from anomem.testing import assert_within_budget, draw
from tests.native.invariances import assert_same_bits_with_any_number_of_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# B, d, H, W, M: tails of the vectors, the panels, the register blocks and the chunks of positions.
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 5, 3), (3, 33, 6, 7, 70), (1, 64, 32, 32, 9)]


def against_reference(function: Any, *tensors: Tensor | None, **options: Any) -> None:
    """Every result of `function` by the budget; a float64 kernel is held to float32 arithmetic."""
    narrow = [x if x is None or x.dtype != torch.float64 else x.float() for x in tensors]
    inputs = [n if x is None or n is None else n.to(x.dtype) for x, n in zip(tensors, narrow, strict=True)]
    actual, plain, exact = (
        function(*inputs, impl="native", **options),
        function(*narrow, impl="reference", **options),
        function(*(None if x is None else x.double() for x in inputs), impl="reference", **options),
    )
    pairs = [(actual, plain, exact)] if isinstance(actual, Tensor) else list(zip(actual, plain, exact, strict=True))
    for i, (mine, theirs, truth) in enumerate(pairs):
        if mine.dtype == torch.int64:
            assert torch.equal(mine, truth)
        else:
            assert_within_budget(mine, theirs, truth, f"result {i}")


def distances(
    feature_map: Tensor, prototypes: Tensor, values: Tensor | None = None, prior: Tensor | None = None, **options: Any
) -> Tensor:
    return deviation_map(feature_map, prototypes, values=values, log_prior=prior, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("normalize", ["layer", "l2", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_map_within_budget(
    shape: tuple[int, int, int, int, int], normalize: str, distance: str, dtype: torch.dtype
) -> None:
    batch, d, height, width, m = shape
    feature_map, prototypes = draw(batch, d, height, width, dtype=dtype), draw(m, d, dtype=dtype, seed=1)
    against_reference(distances, feature_map, prototypes, normalize=normalize, distance=distance, beta=0.7)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_map_with_values_and_a_prior(dtype: torch.dtype, distance: str) -> None:
    feature_map, prototypes = draw(2, 20, 4, 5, dtype=dtype), draw(37, 20, dtype=dtype, seed=1)
    values, prior = draw(37, 20, dtype=dtype, seed=2), draw(20, 37, seed=3).log_softmax(dim=1)
    prior[:, 5] = -torch.inf  # a prototype that is never there
    against_reference(distances, feature_map, prototypes, values, prior, distance=distance)


def test_map_from_any_layout() -> None:
    feature_map, prototypes = draw(2, 20, 4, 5), draw(9, 20, seed=1)
    expected = deviation_map(feature_map, prototypes, impl="native")
    for same in (
        feature_map.contiguous(memory_format=torch.channels_last),
        feature_map.transpose(2, 3).contiguous().transpose(2, 3),
        torch.nn.functional.pad(feature_map, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    ):
        assert torch.equal(deviation_map(same, prototypes, impl="native"), expected)


@pytest.mark.parametrize("batch", [0, 2])
def test_empty_map_and_learned_beta(batch: int) -> None:
    feature_map, prototypes = draw(batch, 6, 3, 3), draw(4, 6, seed=1)
    against_reference(distances, feature_map, prototypes, beta=torch.tensor(0.4))


def test_zero_features_under_l2() -> None:
    feature_map, prototypes = draw(1, 6, 3, 3), draw(4, 6, seed=1)
    feature_map[0, :, 1, 1], prototypes[2] = 0, 0
    for distance in ("cosine", "l2"):
        against_reference(distances, feature_map, prototypes, normalize="l2", distance=distance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", ["layer", "l2", "none"])
def test_a_bad_feature_spoils_its_own_position_only(normalize: Any, bad: float) -> None:
    feature_map, prototypes = draw(2, 6, 3, 3), draw(4, 6, seed=1)
    feature_map[1, 2, 0, 1] = bad
    got, expected = (
        deviation_map(feature_map, prototypes, normalize=normalize, impl=i) for i in ("native", "reference")
    )
    assert torch.equal(got.isnan(), expected.isnan())
    assert int(got.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", ["layer", "l2", "none"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (513, 70, 33), (1300, 9, 64)])
def test_diagnostics_within_budget(sizes: tuple[int, int, int], normalize: str, dtype: torch.dtype) -> None:
    """Counts exactly; mass, entropies and mean length by the budget."""
    n, m, d = sizes
    query, prototypes = draw(n, d, dtype=dtype), draw(m, d, dtype=dtype, seed=1)
    against_reference(memory_diagnostics, query, prototypes, normalize=normalize)


def test_first_of_equal_prototypes_counts() -> None:
    query, prototypes = draw(50, 8), draw(3, 8, seed=1).repeat(2, 1)
    used = memory_diagnostics(query, prototypes, impl="native").usage
    assert used[3:].tolist() == [0, 0, 0]
    assert torch.equal(used, memory_diagnostics(query, prototypes, impl="reference").usage)


def test_direction_is_the_mean_unit_retrieval() -> None:
    query, prototypes = draw(300, 8), draw(9, 8, seed=1)
    hopfield_retrieve(query, prototypes, impl="native")
    direction = torch.ops.anomem.native_usage(query.double(), prototypes.double(), None, 0.5, 1)[3]
    read = hopfield_retrieve(query.double(), prototypes.double(), beta=0.5, impl="reference")
    torch.testing.assert_close(direction, torch.nn.functional.normalize(read, dim=1).mean(dim=0))


def test_same_bits_with_any_number_of_threads() -> None:
    feature_map, query, prototypes = draw(3, 24, 20, 20), draw(1300, 24, seed=2), draw(70, 24, seed=1)
    assert_same_bits_with_any_number_of_threads(
        lambda: [
            deviation_map(feature_map, prototypes, impl="native"),
            *memory_diagnostics(query, prototypes, impl="native"),
        ]
    )


def test_opcheck() -> None:
    operators = torch.ops.anomem
    feature_map, prototypes = draw(2, 6, 3, 3), draw(4, 6, seed=1)
    deviation_map(feature_map, prototypes, impl="native")
    for values, beta, prior in ((None, None, None), (prototypes, torch.tensor(0.4), draw(9, 4))):
        torch.library.opcheck(
            operators.native_deviation_map.default, (feature_map, prototypes, values, beta, 0.5, 1, 0, prior)
        )
        torch.library.opcheck(operators.native_usage.default, (draw(7, 6), prototypes, beta, 0.5, 1))


def test_compiles_in_one_graph() -> None:
    def both(feature_map: Tensor, query: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        scores = deviation_map(feature_map, prototypes, impl="native")
        return scores, memory_diagnostics(query, prototypes, impl="native").effective

    inputs = (draw(2, 6, 3, 3), draw(7, 6, seed=2), draw(4, 6, seed=1))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled(*inputs), both(*inputs), strict=True))


def test_the_operators_refuse_what_would_read_outside() -> None:
    operators = torch.ops.anomem
    feature_map, query, prototypes = draw(2, 6, 3, 3), draw(7, 6), draw(4, 6, seed=1)
    deviation_map(feature_map, prototypes, impl="native")
    rest = (None, 0.5, 1)
    for operator, arguments, message in (
        (operators.native_deviation_map, (feature_map[0], prototypes, None, *rest, 0, None), "map"),
        (operators.native_deviation_map, (feature_map, prototypes[:, :3].contiguous(), None, *rest, 0, None), "keys"),
        (
            operators.native_deviation_map,
            (feature_map, prototypes, prototypes[:, :3].contiguous(), *rest, 0, None),
            "v",
        ),
        (operators.native_deviation_map, (feature_map, prototypes, None, *rest, 2, None), "distance"),
        (operators.native_deviation_map, (feature_map, prototypes, None, *rest, 0, draw(8, 4)), "log_prior"),
        (operators.native_usage, (query[:, :3], prototypes, *rest), "keys"),
        (operators.native_usage, (query[0], prototypes, *rest), "query"),
        (operators.native_usage, (query.double(), prototypes, *rest), "keys"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
