"""Cases small enough to be computed on paper."""

from __future__ import annotations

import math

import pytest
import torch

from anomem import reference as R

DOUBLE = torch.float64


def test_retrieval_of_two_prototypes() -> None:
    # Logits beta·q·k = (ln 3, 0): weights 3/4 and 1/4.
    query = torch.tensor([[math.log(3.0), 0.0]], dtype=DOUBLE)
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    retrieval = R.hopfield_retrieve(query, prototypes, beta=1.0, normalize="none")
    torch.testing.assert_close(retrieval.weights, torch.tensor([[0.75, 0.25]], dtype=DOUBLE))
    torch.testing.assert_close(retrieval.out, torch.tensor([[0.75, 0.25]], dtype=DOUBLE))
    torch.testing.assert_close(retrieval.lse, torch.tensor([math.log(4.0)], dtype=DOUBLE))


def test_default_beta_is_one_over_root_d() -> None:
    query, prototypes = torch.randn(3, 4, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
    given = R.hopfield_retrieve(query, prototypes, beta=0.5)
    torch.testing.assert_close(R.hopfield_retrieve(query, prototypes).out, given.out)


def test_layer_normalisation_of_tied_prototypes() -> None:
    # LayerNorm of (1, 3) and of (3, 1) is (−1, 1) and (1, −1) up to eps; a query equal to the first gives logits ±2.
    prototypes = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=DOUBLE)
    retrieval = R.hopfield_retrieve(prototypes[:1], prototypes, beta=1.0)
    weight = 1 / (1 + math.exp(-4.0))
    expected = torch.tensor([[1 - 2 * weight, 2 * weight - 1]], dtype=DOUBLE)
    torch.testing.assert_close(retrieval.out, expected, atol=1e-4, rtol=0)


def test_two_steps_read_at_the_updated_state() -> None:
    query, prototypes = torch.randn(3, 4, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
    state = R.hopfield_retrieve(query, prototypes, beta=2.0, normalize="none").out
    expected = R.hopfield_retrieve(state, prototypes, beta=2.0, normalize="none").out
    twice = R.hopfield_retrieve(query, prototypes, beta=2.0, normalize="none", steps=2).out
    torch.testing.assert_close(twice, expected)


def test_separate_values_are_read_as_they_are() -> None:
    query, prototypes = torch.zeros(1, 2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    values = torch.tensor([[2.0, 0.0, 4.0], [0.0, 6.0, 0.0]], dtype=DOUBLE)
    retrieval = R.hopfield_retrieve(query, prototypes, values=values, normalize="none")
    torch.testing.assert_close(retrieval.out, torch.tensor([[1.0, 3.0, 2.0]], dtype=DOUBLE))


def test_location_prior_shifts_the_logits() -> None:
    query, prototypes = torch.zeros(1, 2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    log_prior = torch.tensor([0.9, 0.1], dtype=DOUBLE).log()
    retrieval = R.hopfield_retrieve(query, prototypes, normalize="none", log_prior=log_prior)
    torch.testing.assert_close(retrieval.out, torch.tensor([[0.9, 0.1]], dtype=DOUBLE))


def test_shrinkage_drops_small_weights_and_renormalises() -> None:
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], dtype=DOUBLE)
    torch.testing.assert_close(
        R.shrink_weights(weights, 0.2), torch.tensor([[2 / 3, 1 / 3, 0.0], [0.4, 0.3, 0.3]], dtype=DOUBLE)
    )
    assert not R.shrink_weights(weights, 0.7).any()


def test_entropy_of_weights() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(R.weights_entropy(weights), torch.tensor([math.log(2.0), 0.0], dtype=DOUBLE))


def test_nt_xent_of_two_orthogonal_pairs() -> None:
    # Every row: its positive at cosine 1, two negatives at cosine 0: log(e^2 + 2) − 2 at tau = 1/2.
    z = torch.eye(2, dtype=DOUBLE)[None]
    rows = R.nt_xent_rows(z, 3 * z, 0.5)
    torch.testing.assert_close(rows, torch.full((1, 4), math.log(math.exp(2) + 2) - 2, dtype=DOUBLE))


def test_nt_xent_of_one_pair_is_zero() -> None:
    z = torch.randn(3, 1, 5, dtype=DOUBLE, requires_grad=True)
    rows = R.nt_xent_rows(z, torch.randn(3, 1, 5, dtype=DOUBLE), 0.2)
    (gradient,) = torch.autograd.grad(rows.sum(), z)
    torch.testing.assert_close(rows, torch.zeros(3, 2, dtype=DOUBLE))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_info_nce_is_cross_entropy() -> None:
    rows, columns = torch.randn(2, 3, 4, dtype=DOUBLE), torch.randn(2, 5, 4, dtype=DOUBLE)
    positive = torch.tensor([4, 0, 2])
    logits = R.l2_normalize(rows) @ R.l2_normalize(columns).mT / 0.1
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), positive.repeat(2), reduction="none")
    torch.testing.assert_close(R.info_nce_rows(rows, columns, positive, None, 0.1).flatten(), expected)


def test_nt_xent_is_info_nce_row_by_row() -> None:
    z, z_pair = torch.randn(2, 3, 4, dtype=DOUBLE), torch.randn(2, 3, 4, dtype=DOUBLE)
    union, index = torch.cat([z, z_pair], dim=1), torch.arange(6)
    expected = R.info_nce_rows(union, union, index.roll(3), index, 0.3)
    torch.testing.assert_close(R.nt_xent_rows(z, z_pair, 0.3), expected)


def test_variance_hinge() -> None:
    # Column one has unbiased variance 2, column two 0: hinge 0 and 1 − sqrt(eps).
    x = torch.tensor([[[1.0, 5.0], [3.0, 5.0]]], dtype=DOUBLE)
    torch.testing.assert_close(R.variance_hinge(x, 1.0, 1e-4), torch.tensor([(1 - 1e-2) / 2], dtype=DOUBLE))


def test_gather_and_positions() -> None:
    feature_map = torch.arange(2 * 3 * 2 * 2, dtype=DOUBLE).reshape(2, 3, 2, 2)
    picked = R.gather_positions(feature_map, torch.tensor([3, 0]))
    assert picked.tolist() == [[[3, 7, 11], [15, 19, 23]], [[0, 4, 8], [12, 16, 20]]]
    own = R.gather_positions(feature_map, torch.tensor([[3], [0]]))
    assert own.tolist() == [[[3, 7, 11], [12, 16, 20]]]


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 12), (0.5, 6), (0.49, 5), (0.01, 1)])
def test_sampled_positions_are_distinct_and_counted(ratio: float, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = R.sample_positions(3, 4, ratio, batch=7, generator=generator)
    assert positions.shape == (7, count)
    assert all(len(set(row)) == count and 0 <= min(row) <= max(row) < 12 for row in positions.tolist())
    assert R.sample_positions(3, 4, ratio, generator=generator).shape == (count,)


def test_a_count_does_not_fall_to_rounding() -> None:
    assert 100 * 0.29 < 29  # in floating point
    assert R.sample_positions(10, 10, 0.29).shape == (29,)


def test_deviation_distances() -> None:
    query = torch.tensor([[3.0, 4.0]], dtype=DOUBLE)
    torch.testing.assert_close(R.distance(query, torch.zeros_like(query), "l2"), torch.tensor([5.0], dtype=DOUBLE))
    turned = torch.tensor([[-4.0, 3.0]], dtype=DOUBLE)
    torch.testing.assert_close(R.distance(query, turned, "cosine"), torch.ones(1, dtype=DOUBLE))


def test_deviation_map_is_the_distance_at_every_position() -> None:
    feature_map, prototypes = torch.randn(2, 4, 3, 5, dtype=DOUBLE), torch.randn(6, 4, dtype=DOUBLE)
    distances = R.deviation_map(feature_map, prototypes, kind="l2")
    difference = R.deviation(feature_map[1, :, 2, 3], prototypes)
    torch.testing.assert_close(distances[1, 2, 3], difference.norm())


def test_diagnostics_tell_collapse_from_use() -> None:
    prototypes = torch.eye(4, dtype=DOUBLE)
    used = R.memory_diagnostics(prototypes.repeat(2, 1), prototypes, beta=50.0, normalize="none")
    assert used.usage.tolist() == [2, 2, 2, 2]
    torch.testing.assert_close(used.effective, torch.tensor(4.0, dtype=DOUBLE), atol=1e-6, rtol=0)
    torch.testing.assert_close(used.perplexity, torch.tensor(1.0, dtype=DOUBLE), atol=1e-6, rtol=0)
    averaged = R.memory_diagnostics(prototypes.repeat(2, 1), prototypes, beta=0.0, normalize="none")
    torch.testing.assert_close(averaged.perplexity, torch.tensor(4.0, dtype=DOUBLE))
    torch.testing.assert_close(averaged.mean_length, torch.tensor(1.0, dtype=DOUBLE))


def test_scale_weights() -> None:
    assert R.scale_weights(3) == (0.25, 0.5, 1.0)
    assert R.scale_weights(4, "linear") == (0.25, 0.5, 0.75, 1.0)


def test_margin_loss() -> None:
    # Normal at length 1: 1 − 1/2; anomaly at length 1/2: 2 − 1/2; both on the right side: 0.
    length, is_normal = torch.tensor([1.0, 0.5, 0.4, 3.0]), torch.tensor([True, False, True, False])
    torch.testing.assert_close(R.margin_loss(length, is_normal), torch.tensor((0.5 + 1.5) / 4))


def test_contrasted_memory_loss_of_anomalies_contrasts_the_views() -> None:
    z, z_pair = torch.randn(2, 3, 4, dtype=DOUBLE), torch.randn(2, 3, 4, dtype=DOUBLE)
    none_normal = torch.zeros(3, dtype=torch.bool)
    contrast, _ = R.contrasted_memory_loss(z, z_pair, torch.randn(5, 4, dtype=DOUBLE), is_normal=none_normal)
    torch.testing.assert_close(contrast, R.nt_xent_rows(z, z_pair, 0.2).mean())


def test_strided_convolutions_of_a_counted_map() -> None:
    # Of a map 0 1 2 | 3 4 5 | 6 7 8: sums of 3×3 windows around its corners, and twice the corners themselves.
    x = torch.arange(9, dtype=DOUBLE).view(1, 1, 3, 3)
    branch, straight = R.downsample(x, torch.ones(1, 1, 3, 3, dtype=DOUBLE), 2 * torch.ones(1, 1, 1, 1, dtype=DOUBLE))
    torch.testing.assert_close(branch[0, 0], torch.tensor([[8.0, 12.0], [20.0, 24.0]], dtype=DOUBLE))
    torch.testing.assert_close(straight[0, 0], torch.tensor([[0.0, 4.0], [12.0, 16.0]], dtype=DOUBLE))


def test_convolution_of_a_counted_map() -> None:
    # Sums of the 3×3 windows of a map 0 1 2 | 3 4 5 | 6 7 8.
    x = torch.arange(9, dtype=DOUBLE).view(1, 1, 3, 3)
    expected = torch.tensor([[8.0, 15.0, 12.0], [21.0, 36.0, 27.0], [20.0, 33.0, 24.0]], dtype=DOUBLE)
    torch.testing.assert_close(R.conv3x3(x, torch.ones(1, 1, 3, 3, dtype=DOUBLE))[0, 0], expected)
