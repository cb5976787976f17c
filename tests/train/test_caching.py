"""Gradient caching: the same loss and gradients as with the graph of the whole batch, in memory that stays flat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from anomem.augment import AugmentConfig
from anomem.data import ResidentImages
from anomem.models import AnoMem, ModelConfig, NetworkEncoder, build_model
from anomem.ops import retrieve
from anomem.train import LossConfig, OptimizerConfig, RunConfig, TrainConfig, objective, steps
from anomem.train.batches import training_batches
from anomem.train.network import Network, statistics_kept
from anomem.train.objective import pairs_of
from anomem.train.ranks import ONE
from anomem.train.rows import Rows
from anomem.train.steps import SampledVectors, Stage1Step
from benchmarks.harness.measure import peak_bytes
from tests.stand_in.calls import HAVE_NATIVE

SIDE = 16


class Small(nn.Module):
    """Two maps, with dropout and, if wanted, batch norm."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6) if norm else nn.Tanh())
        self.second = nn.Sequential(nn.Dropout(0.3), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x)
        return [first, self.second(first)]


def config_of(**changes: object) -> TrainConfig:
    """Random augmentation, labelled anomalies in a batch of seven, positions of each image."""
    config = TrainConfig(
        augment=AugmentConfig(),
        model=ModelConfig(prototypes=(5,), projection=4),
        loss=LossConfig(max_positions=3, negatives="both", positions_per_image=True),
        optimizer=OptimizerConfig(steps=2, batch_size=7, warmup=0),
        run=RunConfig(device="cpu", precision="float32", memory_format="contiguous"),
        synthetic_outliers=0.5,
        prototypes_from="normal",
    )
    return replace(config, optimizer=replace(config.optimizer, **changes))  # type: ignore[arg-type]


def model_of(config: TrainConfig, norm: bool) -> AnoMem:
    torch.manual_seed(1)
    encoder = NetworkEncoder(Small(norm), (SIDE, SIDE), 1)
    return build_model(config.model, (SIDE, SIDE), 1, [0.5], [0.25], encoder=encoder).double()


def gradients(config: TrainConfig, norm: bool, chunked: bool = False) -> tuple[float, dict[str, Tensor], AnoMem]:
    """Loss and gradients of the first step in float64; `chunked` keeps the graphs of all micro-batches."""
    images = ResidentImages(torch.randint(256, (9, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(2)).byte())
    model = model_of(config, norm).train()
    is_normal = torch.tensor([True] * 6 + [False] * 3)
    step = Stage1Step(model, Network(model, ONE), images, is_normal, config, ONE)
    views_of = step.views_of

    def in_float64(*given: Any) -> tuple[Tensor, Tensor | None]:
        views, normal = views_of(*given)
        return views.double(), normal

    step.views_of = in_float64  # type: ignore[assignment]
    shares = step.shares
    batch = next(iter(training_batches(images, shares.batch, 0, 0, 1, shares.places, at_once=shares.at_once)))
    if not chunked:
        loss = step(batch).total
    else:
        (chunks,) = step.shares.parts
        found = [step._sampled(batch, 0, rows, number) for number, rows in enumerate(chunks)]
        by_scale = zip(*(pairs_of(sampled) for sampled, _ in found), strict=True)
        joined = [tuple(torch.cat(view, dim=1) for view in zip(*pairs, strict=True)) for pairs in by_scale]
        loss, _ = step._loss(joined, torch.cat([normal for _, normal in found]), 0)
        loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model


def assert_same(one: tuple[float, dict[str, Tensor], AnoMem], other: tuple[float, dict[str, Tensor], AnoMem]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-9)
    assert one[1].keys() == other[1].keys()
    assert len(one[1]) > 6
    for name, gradient in other[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(one[1][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("micro", [2, 4])
def test_cached_gradients_are_those_of_the_graph(norm: bool, micro: int) -> None:
    cached = gradients(config_of(micro_batch=micro), norm)
    with_graphs = gradients(config_of(micro_batch=micro), norm, chunked=True)
    assert_same(cached, with_graphs)
    for name, buffer in with_graphs[2].named_buffers():  # running averages are updated once
        torch.testing.assert_close(dict(cached[2].named_buffers())[name], buffer, msg=name)


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (2, {}),
        (1, {}),
        (0, {}),
        (0, {"positive": "view"}),
        (0, {"symmetric": False}),
    ],
)
def test_positions_contrasted_apart(count: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches without end: so many of the three positions at once, where they are no negatives of each other; each by
    blocks of its rows where it fills a piece."""
    config = config_of(micro_batch=3)
    config = replace(config, loss=replace(config.loss, negatives="image", **changes))
    with_graphs = gradients(config, True, chunked=True)
    calls, blockwise = [], []
    loss_of, by_blocks = Stage1Step._loss, objective.scale_backward

    def counted(self: Stage1Step, pairs: list[tuple[Tensor, Tensor]], *rest: Any) -> Any:
        calls.append([len(z) for z, _ in pairs])
        return loss_of(self, pairs, *rest)

    def counted_by_blocks(*given: Any) -> Any:
        blockwise.append(given[2])
        return by_blocks(*given)

    monkeypatch.setattr(Stage1Step, "_loss", counted)
    monkeypatch.setattr(steps, "scale_backward", counted_by_blocks)
    rows = 2 * len(Rows.of(config.optimizer.batch_size, config.synthetic_outliers))
    monkeypatch.setattr(steps, "PIECE", max(1, count * rows * 4))
    found = gradients(config, True)
    if "positive" in changes:  # no memory answers
        for parameters in (found[1], with_graphs[1]):
            memories = [name for name in parameters if name.startswith("memories.")]
            assert not any(parameters.pop(name).any() for name in memories)
    assert_same(found, with_graphs)
    assert calls == {0: [], 1: [[1]] * 6, 2: [[2], [1]] * 2}[count]
    assert blockwise == ([] if count else [0, 0, 0, 1, 1, 1])


def test_sampled_vectors_are_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients take their place for a while; the log needs them."""
    found = {}
    run = Stage1Step.__call__

    def kept(self: Stage1Step, batch: Any) -> Any:
        loss = run(self, batch)
        found[self.config.optimizer.micro_batch] = loss.sampled
        return loss

    monkeypatch.setattr(Stage1Step, "__call__", kept)
    with mock.patch.object(nn.Dropout, "forward", lambda _, x: x):
        for micro in (None, 3):
            gradients(replace(config_of(micro_batch=micro), synthetic_outliers=0.0), False)
    for whole, cached in zip(found[None], found[3], strict=True):
        torch.testing.assert_close(whole, cached)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.BatchNorm2d(6, track_running_stats=False),
    ],
    ids=["batch", "instance", "batch without averages"],
)
def test_running_averages_follow_one_pass(norm: nn.Module) -> None:
    """The second pass over the same views normalises as the first one did and changes no average."""
    views = torch.randn(5, 6, 8, 8, generator=torch.Generator().manual_seed(1)) + 2
    first = norm(views)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with statistics_kept(norm):
        second = norm(views)
    assert torch.equal(first, second)
    assert norm.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    tracks = "running_mean" in before
    norm(views)
    assert tracks == any(not torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_without_dropout_and_batch_norm_they_are_those_of_the_whole_batch() -> None:
    with mock.patch.object(nn.Dropout, "forward", lambda _, x: x):
        whole = gradients(config_of(), False)
        assert_same(gradients(config_of(micro_batch=3), False), whole)
        with pytest.raises(AssertionError):  # of parts, each contrasted on its own, they are not
            assert_same(gradients(config_of(accumulate=2), False), whole)


@pytest.mark.parametrize("frozen", ["first", "all"])
def test_frozen_scales_train_their_memories_alone(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale without anything to train behind its vectors has no second pass."""
    made = model_of

    def with_frozen(config: TrainConfig, norm: bool) -> AnoMem:
        model = made(config, norm)
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(frozen != "all" and ".first." not in f".{name}")
        return model

    monkeypatch.setitem(globals(), "model_of", with_frozen)

    def of(**changes: object) -> tuple[float, dict[str, Tensor], AnoMem]:
        config = config_of(**changes)
        return gradients(replace(config, model=replace(config.model, projection=None)), False)

    with mock.patch.object(nn.Dropout, "forward", lambda _, x: x):
        whole, cached = of(), of(micro_batch=3)
    assert cached[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(cached[1][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_a_second_pass_with_other_dropout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graphs = gradients(config_of(micro_batch=2), False, chunked=True)

    def unseeded(*_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(Stage1Step, "_dropout", contextmanager(unseeded))
    with pytest.raises(AssertionError):
        assert_same(gradients(config_of(micro_batch=2), False), with_graphs)


def test_vectors_are_put_together_and_taken_apart() -> None:
    parts = [torch.randn(3, 2 * rows, 4) for rows in (1, 3, 2)]
    held = SampledVectors(6)
    for part, first in zip(parts, (0, 1, 4), strict=True):
        held.write([part], first)
    assert torch.equal(held.scales[0][:, 1:4], parts[1][:, :3])
    for part, first, rows in zip(parts, (0, 1, 4), (1, 3, 2), strict=True):
        assert torch.equal(part, held.read(first, rows)[0])


@pytest.mark.skipif(not HAVE_NATIVE, reason="plain PyTorch stores the pairs")
@pytest.mark.parametrize("places", [None, [5, 6, 7, 1]])
def test_a_batch_read_in_parts_has_the_same_images(places: list[int] | None) -> None:
    images = ResidentImages(torch.randint(256, (20, 3, 4, 5), dtype=torch.uint8))
    together, apart = (training_batches(images, 9, 1, 0, 3, places, at_once=at_once) for at_once in (True, False))
    for whole, parts in zip(together, apart, strict=True):
        assert isinstance(whole.images, Tensor)
        assert not isinstance(parts.images, Tensor)
        for some in (range(5, 8), range(5, 5), range(6, 7)):
            assert torch.equal(whole.at(some), parts.at(some))
            assert torch.equal(whole.indices_at(some), parts.indices_at(some))
        pairs = zip(whole.runs([6, 7, 1]), parts.runs([6, 7, 1]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_memory_does_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieve, "KEPT_BYTES", 0)  # a bound that these small batches do not reach
    peaks = {}
    for batch, micro in ((32, 8), (128, 8), (128, None)):
        config = config_of(micro_batch=micro, batch_size=batch)
        config = replace(config, loss=replace(config.loss, negatives="image"), synthetic_outliers=0.0)
        config = replace(config, model=replace(config.model, impl="native"))
        images = ResidentImages(torch.zeros(batch, 1, SIDE, SIDE, dtype=torch.uint8))
        model = model_of(config, True).float().train()
        step = Stage1Step(model, Network(model, ONE), images, None, config, ONE)
        shares = step.shares
        batch_of = next(iter(training_batches(images, batch, 0, 0, 1, shares.places, at_once=shares.at_once)))
        step(batch_of)
        peaks[batch, micro] = peak_bytes(lambda step=step, batch_of=batch_of: step(batch_of), "cpu")
    # Of four times the batch the images and the sampled vectors grow; the maps, most of the memory, do not.
    assert peaks[128, 8] < 3 * peaks[32, 8]
    assert peaks[128, 8] < peaks[128, None] / 3
