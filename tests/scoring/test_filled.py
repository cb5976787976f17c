"""Filled memories in a model, and the scores of what was fitted: each sees the defects it is for."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.models import AnoMem, ModelConfig, build_model
from anomem.models.pretrained import PretrainedEncoder, pretrained_encoder
from anomem.reference.retrieve import normalize_rows
from anomem.scoring.config import FillConfig
from anomem.scoring.detector import MomentSums
from anomem.scoring.filled import FilledScorer, NormalQueries, fill_memories, join_moments
from anomem.scoring.fitted import restored_detector
from anomem.scoring.labelled import FewLabels

SIZE = (32, 32)


def pattern(count: int, seed: int = 0) -> Tensor:
    """Noisy images [count, 1, 32, 32] in [0, 1] of one part: bright on the left, stripes on the right."""
    source = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, 32)
    clean = torch.where(x < 0.5, 0.8 - x, 0.4 + 0.3 * torch.sin(40 * x)).expand(32, 32)
    return (clean + 0.03 * torch.randn(count, 1, 32, 32, generator=source)).clamp(0, 1)


def spotted(count: int) -> Tensor:
    images = pattern(count, 7)
    images[:, :, 4:10, 20:26] = 0.9
    return images


def of_another_material(count: int) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(9)) * 0.3 + 0.4


def filled(prototypes: tuple[float, ...] = (24,), **options: object) -> AnoMem:
    config = ModelConfig(backbone="small", prototypes=(4,), **options)  # type: ignore[arg-type]
    model = build_model(config, SIZE, 1, [0.5], [0.2], seed=3)
    fill_memories(model, NormalQueries(model, lambda: pattern(24).split(10)), prototypes)
    return model


@functools.cache
def scorer(alignment: str) -> FilledScorer:
    found = FilledScorer(filled(), alignment)  # type: ignore[arg-type]
    found.fit(NormalQueries(found.model, lambda: pattern(60, 1).split(13)))
    return found


@functools.cache
def untouched() -> AnoMem:
    return build_model(ModelConfig(backbone="small", prototypes=(4,)), SIZE, 1, [0.5], [0.2], seed=3)


def test_memories_hold_features_of_normals() -> None:
    model = build_model(ModelConfig(backbone="small", prototypes=(4,)), SIZE, 1, [0.5], [0.2])
    report = fill_memories(model, NormalQueries(model, lambda: pattern(6).split(4)), (5, 7, 0.5), "random")
    counts = [6 * h * w for h, w in model.encoder.sizes]
    assert [r.rows for r in report] == counts
    assert [r.prototypes for r in report] == [5, 7, counts[2] // 2]
    assert [r.name for r in report] == list(model.encoder.names)
    with torch.no_grad():
        queries = model.queries(model(pattern(6)))
    for memory, query in zip(model.memories, queries, strict=True):
        rows = normalize_rows(query.flatten(0, 1), "layer")
        nearest = torch.cdist(memory.prototypes.detach(), rows).amin(dim=1)
        assert float(nearest.max()) < 1e-2, "every prototype is a feature"
    assert not model.training


def test_same_images_in_other_batches_fill_alike() -> None:
    models = [build_model(ModelConfig(backbone="small", prototypes=(4,)), SIZE, 1, [0.5], [0.2]) for _ in range(2)]
    for model, batch in zip(models, (3, 24), strict=True):
        fill_memories(model, NormalQueries(model, lambda batch=batch: pattern(24).split(batch)), (16,))
    for one, other in zip(models[0].memories, models[1].memories, strict=True):
        torch.testing.assert_close(one.prototypes, other.prototypes, rtol=1e-3, atol=1e-3)


def test_queries_are_encoded_once_where_they_fit() -> None:
    model, calls = untouched(), []

    def batches() -> list[Tensor]:
        calls.append(1)
        return [pattern(3), pattern(2, 1)]

    held, again = NormalQueries(model, batches), NormalQueries(model, batches, at_most=1000)
    for queries, encoded in ((held, 1), (again, 3)):
        calls.clear()
        passes = [list(queries) for _ in range(3)]
        assert len(calls) == encoded
        for one, other in zip(passes[0], passes[2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_few_normals_give_few_prototypes() -> None:
    model = build_model(ModelConfig(backbone="small", prototypes=(4,)), SIZE, 1, [0.5], [0.2])
    report = fill_memories(model, NormalQueries(model, lambda: [pattern(1)]), (1024,))
    assert [r.prototypes for r in report] == [min(1024, h * w) for h, w in model.encoder.sizes]


def test_wrong_arguments() -> None:
    model = build_model(ModelConfig(backbone="small"), SIZE, 1, [0.5], [0.2])
    with pytest.raises(ArgumentError, match="at least one normal image"):
        fill_memories(model, [], (4,))
    with pytest.raises(ArgumentError, match=r"prototypes.*one number, or 3"):
        fill_memories(model, [], (4, 4))
    separate = build_model(ModelConfig(backbone="small", separate_values=True), SIZE, 1, [0.5], [0.2])
    with pytest.raises(ArgumentError, match="separate_values"):
        fill_memories(separate, [], (4,))
    with pytest.raises(ArgumentError, match="alignment"):
        FilledScorer(model, "maybe")  # type: ignore[arg-type]
    for batches in ([], [pattern(1)]):
        with pytest.raises(ArgumentError, match="at least two"):
            FilledScorer(model, "pooled").fit(NormalQueries(model, lambda batches=batches: batches))


@pytest.mark.parametrize("alignment", ["per_position", "pooled"])
def test_defects_score_higher(alignment: str) -> None:
    found = scorer(alignment)
    normal, spot, other = (found(images).scores for images in (pattern(20, 5), spotted(20), of_another_material(20)))
    assert set(normal) == {"plain", "local", "whole", "both", "either"}
    assert found.lead in normal
    for name in ("plain", "local", "both", "either"):
        assert float(spot[name].min()) > float(normal[name].max()), name
    for name in ("whole", "either"):
        assert float(other[name].min()) > float(normal[name].max()), name


def test_only_positions_can_tell_a_mirrored_part() -> None:
    """Every texture is where it should not be: one Gaussian per position sees it, one for all does not as well."""
    margin = {}
    for alignment in ("per_position", "pooled"):
        found = scorer(alignment)
        normal, mirrored = (found(images).scores["local"] for images in (pattern(20, 5), pattern(20, 5).flip(3)))
        margin[alignment] = float((mirrored.mean() - normal.mean()) / normal.std())
    assert margin["per_position"] > 1.4 * margin["pooled"]


def test_maps_point_at_the_spot() -> None:
    maps = scorer("per_position")(spotted(4)).maps
    for name in ("plain", "local"):
        assert maps[name].shape == (4, 32, 32)
        inside = maps[name][:, 4:10, 20:26].mean()
        outside = maps[name][:, 16:].mean()
        assert float(inside) > 1.5 * float(outside), name


def test_moments_of_two_halves_are_those_of_all() -> None:
    rows = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.rand(5) + 3
    sums = [MomentSums(3, 5) for _ in range(3)]
    for moments, part in zip(sums, (rows, rows[:17], rows[17:]), strict=True):
        for batch in part.split(6):
            moments.update(batch)
    found = join_moments(sums[1], sums[2])
    for a, b in zip(found.gaussian(), sums[0].gaussian(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(join_moments(MomentSums(3, 5), sums[0]).gaussian(), sums[0].gaussian(), strict=True):
        assert torch.equal(a, b)


def test_spread_is_that_of_new_normals() -> None:
    """Fitted images are nearer to their own Gaussian; the halves see through that."""
    found, new = scorer("pooled"), pattern(200, 11)
    whole = found(new).scores["whole"]
    z = (whole.mean() - found.centre[2]) / found.spread[2]
    fitted = found(pattern(60, 1)).scores["whole"]
    assert abs(float(z)) < 2
    assert float(fitted.mean()) < float(whole.mean())


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_few_normals_are_enough(count: int) -> None:
    found = FilledScorer(filled(), "per_position")
    found.fit(NormalQueries(found.model, lambda: pattern(count).split(2)))
    assert all(bool(v.isfinite().all()) for v in found(pattern(3, 2)).scores.values())


def test_top_by_hand() -> None:
    found = FilledScorer(untouched(), "pooled", top_part=0.25)
    assert found._top(torch.tensor([[1.0, 9.0, 3.0, 5.0, 2.0, 0.0, 7.0, 4.0]])).tolist() == [8.0]
    assert FilledScorer(untouched(), "pooled", top_part=0.01)._top(torch.tensor([[1.0, 9.0]])).tolist() == [9.0]


@pytest.mark.parametrize("size", [(21, 34), (64, 96), (96, 64)])
def test_maps_are_bilinear(size: tuple[int, int]) -> None:
    """Of any size, and of whole multiples of the scales' sizes."""
    found = scorer("pooled")
    given, expected = {}, {}
    for name in ("plain", "local"):
        distances = [torch.rand(3, h * w) for h, w in found.model.encoder.sizes]
        spread = torch.tensor([2.0, 0.5, 3.0])[: len(distances)]
        given[name], expected[name] = (distances, spread), torch.zeros(3, *size)
        for d, shape, by in zip(distances, found.model.encoder.sizes, spread, strict=True):
            small = (d / by).unflatten(1, shape)[:, None]
            expected[name] += torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found._maps(given, size), expected)


def test_reading_a_few_prototypes_is_close_to_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model's own deviation in the features' units where all are read."""
    found, images = scorer("pooled"), spotted(3)
    with torch.no_grad():
        queries = found.model.queries(found.model(images))
        all_read = [
            memory.deviation(query) * query.std(dim=2, correction=0, keepdim=True)
            for memory, query in zip(found.model.memories, queries, strict=True)
        ]
        few = found._deviations(queries)[1]
        monkeypatch.setattr(found, "top_k", None)
        for mine, theirs in zip(found._deviations(queries)[1], all_read, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(mine, theirs) for mine, theirs in zip(few, all_read, strict=True))
    with pytest.raises(ArgumentError, match="top_k"):
        FilledScorer(untouched(), "pooled", top_k=0)


@pytest.mark.parametrize("normalize", ["layer", "l2"])
def test_deviations_are_in_the_features_units(normalize: str) -> None:
    """Three times a feature deviates three times as far in the same direction; its cosine distance is the same."""
    model = filled(normalize=normalize)
    found = FilledScorer(model, "pooled")
    with torch.no_grad():
        queries = model.queries(model(spotted(2)))
        (cosine, deviation), (cosine_of_thrice, deviation_of_thrice) = (
            found._deviations([factor * query for query in queries])
            for factor in (100, 300)  # beyond any epsilon
        )
    for s in range(len(queries)):
        torch.testing.assert_close(cosine_of_thrice[s], cosine[s], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(deviation_of_thrice[s], 3 * deviation[s], rtol=1e-3, atol=1e-2)


def test_without_normalisation_deviations_are_as_they_are() -> None:
    model = filled(normalize="none")
    found = FilledScorer(model, "pooled", top_k=None)
    with torch.no_grad():
        queries = model.queries(model(spotted(2)))
        for mine, memory, query in zip(found._deviations(queries)[1], model.memories, queries, strict=True):
            torch.testing.assert_close(mine, memory.deviation(query), rtol=1e-4, atol=1e-5)


def test_plain_is_the_models_cosine_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    found, images = scorer("per_position"), spotted(3)
    monkeypatch.setattr(found, "top_k", None)  # as the model reads
    with torch.no_grad():
        distances = found.model.distances(found.model(images), "cosine")
        expected = sum(w * found._top(d.flatten(1)) for w, d in zip(found.model.scale_weights, distances, strict=True))
    torch.testing.assert_close(found(images).scores["plain"], expected, rtol=1e-4, atol=1e-5)


def test_few_labels_take_its_pooled_deviations() -> None:
    pytest.importorskip("sklearn")
    found, images = scorer("per_position"), torch.cat([pattern(12, 4), spotted(3)])
    pooled, plain = found.pooled_deviations(images), found(images).scores["plain"]
    assert pooled.shape == (15, 2 * sum(memory.prototypes.shape[1] for memory in found.model.memories))
    labels = FewLabels(pooled.shape[1])
    labels.fit(pooled, plain, torch.arange(15) < 12)
    scores = labels(pooled, plain)
    assert not scores.requires_grad
    assert float(scores[12:].min()) > float(scores[:12].max())


def test_survives_being_stored() -> None:
    before, images = scorer("pooled"), spotted(3)
    after = FilledScorer(filled(), "pooled")
    after.load_state_dict(before.state_dict())
    for name, values in before(images).scores.items():
        assert torch.equal(after(images).scores[name], values)


def test_frozen_encoder_end_to_end() -> None:
    encoder = pretrained_encoder("efficientnet_lite0", (64, 64), channels=1, weights=None)
    assert isinstance(encoder, PretrainedEncoder)
    config = ModelConfig(prototypes=(4,), beta=4 / math.sqrt(112))
    model = build_model(config, (64, 64), 1, encoder.mean, encoder.std, encoder=encoder)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = torch.nn.functional.interpolate(pattern(8), (64, 64))

    normals = NormalQueries(model, lambda: images.split(3))
    fill_memories(model, normals, (16,))
    found = FilledScorer(model, "per_position")
    found.fit(normals)
    assert all(bool(values.isfinite().all()) for values in found(images).scores.values())
    model.train()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("about", [{}, {"units": "norm"}])
def test_a_detector_of_other_units_is_refused(about: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="an earlier version fitted it"):
        restored_detector(untouched(), {}, about, FillConfig(), 0.01, False)
