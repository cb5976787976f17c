"""The model's pieces against the reference."""

from __future__ import annotations

import pytest
import torch

from anomem import reference as R
from anomem.models import DeviationHead, ModelConfig, build_model
from anomem.reference.retrieve import layer_normalize
from anomem.scoring import LocationPrior


@pytest.fixture
def maps() -> list[torch.Tensor]:
    return [torch.randn(3, c, s, s) for c, s in ((16, 8), (32, 4), (64, 2))]


def test_bytes_and_unit_floats_give_the_same_maps() -> None:
    model = build_model(ModelConfig(), (16, 16), 1, [0.3], [0.2]).eval()
    images = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    for actual, expected in zip(model(images), model(images / 255), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_standardized_to_the_bit(channels: int, layout: torch.memory_format) -> None:
    mean, std = [0.3, 0.4, 0.6][:channels], [0.2, 0.1, 0.3][:channels]
    model = build_model(ModelConfig(), (16, 16), channels, mean, std)
    images = torch.rand(4, channels, 16, 16).contiguous(memory_format=layout).requires_grad_()
    found = model.standardized(images)
    assert torch.equal(found, (images - model.mean) / model.std)
    assert found.is_contiguous(memory_format=layout)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(gradient, (1 / model.std).expand_as(images))


@pytest.mark.parametrize("projection", [None, 8])
def test_sampled_vectors_are_the_queries_at_those_positions(maps: list[torch.Tensor], projection: int | None) -> None:
    model = build_model(ModelConfig(projection=projection), (16, 16), 1, [0.5], [0.5])
    positions = [torch.tensor([5, 0, 63]), torch.tensor([15]), torch.tensor([2, 1])]
    for sampled, query, p in zip(model.sample(maps, positions), model.queries(maps), positions, strict=True):
        torch.testing.assert_close(sampled, query[:, p].transpose(0, 1))


def test_distances_are_those_of_the_deviation(maps: list[torch.Tensor]) -> None:
    model = build_model(ModelConfig(prototypes=(7,)), (16, 16), 1, [0.5], [0.5])
    for deviation, distance in zip(model.deviations(maps), model.distances(maps, "l2"), strict=True):
        torch.testing.assert_close(deviation.norm(dim=2), distance.flatten(1))


def test_location_prior_is_the_mean_weight_of_each_position(maps: list[torch.Tensor]) -> None:
    model = build_model(ModelConfig(prototypes=(7,)), (16, 16), 1, [0.5], [0.5])
    prior = LocationPrior([64, 16, 4], [7, 7, 7])
    assert all(not p.any() for p in prior.log_priors)
    prior.fit(model, [model.queries(maps)])
    weights = R.hopfield_retrieve(model.queries(maps)[2], model.memories[2].prototypes).weights  # [3, 4, 7]
    expected = (weights.sum(dim=0) + 1 / 7) / 4
    torch.testing.assert_close(prior.log_priors[2].exp(), expected)


def test_a_uniform_prior_changes_nothing(maps: list[torch.Tensor]) -> None:
    model = build_model(ModelConfig(prototypes=(7,)), (16, 16), 1, [0.5], [0.5])
    uniform = [torch.full((m.shape[2] * m.shape[3], 7), -1.5) for m in maps]
    for with_prior, without in zip(
        model.distances(maps, "cosine", uniform), model.distances(maps, "cosine"), strict=True
    ):
        torch.testing.assert_close(with_prior, without)


def test_deviation_is_norm_of_z_minus_retrieval(maps: list[torch.Tensor]) -> None:
    model = build_model(ModelConfig(prototypes=(7,)), (16, 16), 1, [0.5], [0.5])
    query = maps[1].flatten(2).mT
    retrieved = R.hopfield_retrieve(query, model.memories[1].prototypes).out
    torch.testing.assert_close(model.deviations(maps)[1], layer_normalize(query) - retrieved)


def test_head_scores_are_weighted_lengths() -> None:
    head = DeviationHead([4, 6], [(3, 3), (2, 2)], (0.5, 1.0), hidden=5, embedding=3)
    deviations = [torch.randn(7, 9, 4), torch.randn(7, 4, 6)]
    fine, coarse = (h(x).norm(dim=1) for h, x in zip(head.heads, deviations, strict=True))
    torch.testing.assert_close(head(deviations), 0.5 * fine + coarse)


def test_head_divides_by_the_training_rms() -> None:
    head = DeviationHead([4], [(3, 3)], (1.0,), hidden=5, embedding=3)
    deviations = [torch.randn(7, 9, 4)]
    before = head(deviations)
    head.fit_rms([deviations])
    rms = deviations[0].square().mean().sqrt()
    torch.testing.assert_close(head.heads[0].get_buffer("rms"), rms)
    torch.testing.assert_close(head([deviations[0] * rms]), before)


def test_large_maps_are_pooled_before_they_are_flattened() -> None:
    head = DeviationHead([4], [(40, 24)], (1.0,), hidden=2, embedding=3)
    assert head.heads[0].get_parameter("linear.weight").shape == (3, 2 * 8 * 8)
    assert head([torch.randn(2, 960, 4)]).shape == (2,)
