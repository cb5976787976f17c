"""Eq. (4) as trained against Eq. (4) as specified, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.models import ModelConfig, build_model
from anomem.train import LossConfig
from anomem.train.objective import (
    draw_positions,
    fill_memories,
    memory_figures,
    multi_scale_loss,
    pairs_of,
    scale_criterion,
)
from anomem.train.rows import Rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("negatives", ["image", "position", "both"])
def test_loss_is_equation_4(labelled: bool, negatives: str) -> None:
    model = build_model(ModelConfig(prototypes=(7,)), (16, 16), 1, [0.5], [0.5])
    config = LossConfig(negatives=negatives, max_positions=3, temperature=0.3, variance_weight=0.1)  # type: ignore[arg-type]
    normal = torch.tensor([True, False, True, True, False]) if labelled else None
    views = torch.rand(10, 1, 16, 16)
    maps = model(views)
    positions = draw_positions(model.encoder.sizes, config, 5, generator())
    total, terms = multi_scale_loss(
        model, scale_criterion(config, "auto"), pairs_of(model.sample(maps, positions)), normal
    )
    expected = torch.zeros(())
    for name, m, p, memory, weight in zip(
        model.encoder.names, maps, positions, model.memories, (0.25, 0.5, 1.0), strict=True
    ):
        z, z_pair = (R.gather_positions(half, p) for half in m.chunk(2))
        contrast, variance = R.contrasted_memory_loss(
            z,
            z_pair,
            memory.prototypes,
            is_normal=normal,
            temperature=0.3,
            negatives=negatives,  # type: ignore[arg-type]
        )
        expected = expected + weight * (contrast + 0.1 * variance)
        torch.testing.assert_close(terms[f"contrast/{name}"], contrast)
        torch.testing.assert_close(terms[f"variance/{name}"], variance)
    torch.testing.assert_close(total, expected)
    trained = [model.memories[0].prototypes, *model.encoder.parameters()]
    for actual, reference in zip(
        torch.autograd.grad(total, trained, retain_graph=True), torch.autograd.grad(expected, trained), strict=True
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-5)


def test_positions_are_capped_distinct_and_shared_by_both_views() -> None:
    sizes = [(8, 8), (4, 4), (2, 2)]
    positions = draw_positions(sizes, LossConfig(ratio=0.25, max_positions=8), 5, generator())
    assert [p.shape for p in positions] == [(8,), (4,), (1,)]
    assert all(len(set(p.tolist())) == len(p) for p in positions)
    per_image = draw_positions(sizes, LossConfig(positions_per_image=True, max_positions=3), 5, generator())
    assert [p.shape for p in per_image] == [(10, 3)] * 3
    assert all(torch.equal(p[:5], p[5:]) for p in per_image)


@pytest.mark.parametrize("values", [{"ratio": 0.0}, {"ratio": 1.5}, {"max_positions": 0}])
def test_a_scale_without_positions_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"loss\.(ratio|max_positions)"):
        LossConfig(**values)


def test_a_batch_of_one_has_nothing_to_contrast() -> None:
    model = build_model(ModelConfig(prototypes=(7,)), (16, 16), 1, [0.5], [0.5])
    sampled = [torch.randn(2, 2, c) for c in (16, 32, 64)]  # two views of one image
    with pytest.raises(ArgumentError, match="at least two images"):
        multi_scale_loss(model, scale_criterion(LossConfig(), "auto"), pairs_of(sampled), None)


def test_first_prototypes_are_features_of_normals() -> None:
    model = build_model(ModelConfig(prototypes=(9,)), (16, 16), 1, [0.5], [0.5])
    normal = torch.tensor([True, False])
    views = torch.rand(4, 1, 16, 16)
    model.eval()  # so that the features can be computed again
    fill_memories(model, [(Rows.of(2, 0.0), model(views))], normal, generator())
    allowed = model.queries(model(views))[2][[0, 2]].flatten(0, 1)  # both views of the normal image
    for prototype in model.memories[2].prototypes:
        assert (allowed - prototype).abs().amax(dim=1).min() < 1e-6


def test_figures_see_soft_averaging() -> None:
    model = build_model(ModelConfig(prototypes=(8,), normalize="l2", beta=1e-3), (16, 16), 1, [0.5], [0.5])
    figures = memory_figures(model, [torch.randn(3, 10, c) for c in (16, 32, 64)])
    assert float(figures["perplexity/block3"]) == pytest.approx(8, abs=0.01)
    assert float(figures["mean_length/block3"]) == pytest.approx(1, abs=0.01)
