"""Learned prototypes: they tell new normals from outliers better than their start, and a memory is filled by them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem.errors import ArgumentError
from anomem.evaluate.metrics import auroc
from anomem.models import ModelConfig, build_model
from anomem.reference.retrieve import normalize_rows
from anomem.scoring import FillConfig, NormalQueries, fill_memories, filled
from anomem.scoring.fill import fill_prototypes
from anomem.scoring.learn import learn_prototypes

FEATURES, COUNT, BETA = 24, 8, 4 / 24**0.5


def curve(count: int, seed: int) -> Tensor:
    """Features [count, 24] along a closed curve, LayerNormed: more places than prototypes."""
    source = torch.Generator().manual_seed(seed)
    angle = 6.28 * torch.rand(count, 1, generator=source)
    directions = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(9))
    waves = torch.cat([f(k * angle) for k in (1, 2, 3) for f in (torch.sin, torch.cos)], dim=1)
    noise = 0.1 * torch.randn(count, FEATURES, generator=source)
    return normalize_rows(waves @ directions + noise, "layer")


def told_apart(prototypes: Tensor) -> float:
    """AUROC of new features against the same with noise, which no step has seen."""
    normal = curve(1000, 1)
    noisy = normal + 0.5 * torch.randn(normal.shape, generator=torch.Generator().manual_seed(2))
    rows = torch.cat([normal, noisy])
    cosine = AF.read_memory(rows, prototypes, beta=BETA).cosine
    return auroc(cosine, torch.arange(len(rows)) >= len(normal))


def test_new_normals_are_told_from_outliers_better_than_by_the_start() -> None:
    rows = curve(3000, 0)
    start = fill_prototypes(rows, COUNT)
    learned = learn_prototypes(rows, start, beta=BETA, steps=100)
    assert told_apart(learned) > told_apart(start) + 0.04
    assert torch.equal(start, fill_prototypes(rows, COUNT)), "the start is left as it is"
    assert torch.equal(learn_prototypes(rows, start, beta=BETA, steps=0), start)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    rows = curve(200, 0)
    start, before = rows[:4], torch.get_rng_state()
    with torch.no_grad():  # as filling is
        first, again, other = (learn_prototypes(rows, start, beta=BETA, steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, start)
    assert not first.requires_grad


def test_an_outlier_lies_beyond_a_feature_seen_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = curve(40, 0)
    seen: list[Tensor] = []
    retrieve = AF.hopfield_retrieve

    def watched(z: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(z)
        found: Tensor = retrieve(z, *args, **options)  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(AF, "hopfield_retrieve", watched)
    learn_prototypes(rows, rows[:4], beta=BETA, beyond=0.25, steps=1)
    features, outliers = seen
    z = features[: len(outliers)]
    other = z - (outliers - z) / 0.25
    assert len(outliers) > 10
    assert float(torch.cdist(other.double(), rows.double()).amin(dim=1).max()) < 1e-4, "another row"
    assert float((other - z).norm(dim=1).median()) > 1, "not the row itself"


def test_features_that_are_all_alike_give_finite_prototypes() -> None:
    rows = curve(1, 0).expand(5, -1)
    assert bool(learn_prototypes(rows, rows[:1], beta=BETA, steps=3).isfinite().all())


def test_a_memory_is_filled_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(learn_prototypes, steps=2)
    monkeypatch.setattr(filled, "learn_prototypes", few)
    model = build_model(ModelConfig(backbone="small", prototypes=(4,)), (32, 32), 1, [0.5], [0.2], seed=3)
    images = torch.rand(24, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    queries = NormalQueries(model, lambda: images.split(10))
    fill_memories(model, queries, (5,), "kmeans", seed=3)
    starts = [memory.prototypes.detach().clone() for memory in model.memories]
    report = fill_memories(model, queries, (5,), FillConfig("learned").method, seed=3)
    assert [scale.prototypes for scale in report] == [5] * len(starts)
    for scale, (memory, start) in enumerate(zip(model.memories, starts, strict=True)):
        rows = torch.cat([normalize_rows(q[scale].flatten(0, 1), memory.normalize) for q in queries])
        expected = few(rows, start, beta=float(memory.beta), normalize=memory.normalize, seed=3)
        torch.testing.assert_close(memory.prototypes.detach(), expected)
        assert not torch.equal(memory.prototypes, start)


def test_wrong_arguments_are_named() -> None:
    rows = curve(10, 0)
    for arguments, name in (
        ((rows[:, :5], rows[:2]), "rows"),
        ((rows[:0], rows[:2]), "rows"),
        ((rows, rows[0]), "start"),
    ):
        with pytest.raises(ArgumentError, match=name):
            learn_prototypes(*arguments, beta=BETA)
    with pytest.raises(ArgumentError, match="beyond"):
        learn_prototypes(rows, rows[:2], beta=BETA, beyond=0.0)
