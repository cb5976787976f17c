"""Encoders: shapes, choice of scales, stems, and what is said about a wrong name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomem.errors import ArgumentError
from anomem.models import (
    AnoMem,
    ModelConfig,
    NetworkEncoder,
    TiledEncoder,
    build_encoder,
    build_model,
    describe,
    parameter_count,
)
from anomem.models.encoders import ResidualBlock
from anomem.models.pretrained import pretrained_encoder
from anomem.nn import HopfieldMemory
from anomem.ops import native
from anomem.testing import assert_within_budget, draw


@pytest.mark.parametrize(
    ("backbone", "side", "channels", "sizes"),
    [
        ("small", 16, (16, 32, 64), (8, 4, 2)),
        ("resnet18", 32, (128, 256, 512), (16, 8, 4)),
        ("resnet18", 96, (128, 256, 512), (12, 6, 3)),
        ("resnet50", 32, (512, 1024, 2048), (16, 8, 4)),
        ("efficientnet_b0", 32, (40, 112, 320), (8, 4, 2)),
        ("efficientnet_b0", 96, (40, 112, 320), (12, 6, 3)),
    ],
)
def test_shapes(backbone: str, side: int, channels: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    # Up to 64 pixels the stem keeps the resolution; above, it is torchvision's own.
    encoder = build_encoder(ModelConfig(backbone=backbone), (side, side), 3).eval()
    assert encoder.channels == channels
    assert encoder.sizes == tuple((s, s) for s in sizes)
    maps = encoder(torch.rand(2, 3, side, side))
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]


def test_standard_stem_is_torchvisions_network() -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(backbone="resnet18", stem="standard", scales=("layer4",)), (64, 64), 3).eval()
    network = get_model("resnet18", weights=None).eval()
    actual, expected = list(encoder.state_dict().values()), list(network.state_dict().values())
    assert [v.shape for v in actual] == [v.shape for v in expected[: len(actual)]]
    network.load_state_dict(dict(zip(network.state_dict(), [*actual, *expected[len(actual) :]], strict=True)))
    images = torch.rand(2, 3, 64, 64)
    pooled = encoder(images)[0].mean(dim=(2, 3))
    torch.testing.assert_close(network.fc(pooled), network(images))


@pytest.mark.parametrize("impl", ["auto", "reference", "native"])
def test_a_block_whose_convolutions_change_computes_the_same_in_training(impl: str) -> None:
    if impl == "native" and (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    block = ResidualBlock(3, 4, impl=impl)  # type: ignore[arg-type]
    x = draw(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    block.shortcut[0] = nn.Conv2d(3, 4, 1, stride=2)
    nn.init.constant_(block.shortcut[0].bias, 5.0)
    block(x).sum().backward()
    assert block.shortcut[0].bias.grad is not None
    block.branch[0].stride = block.shortcut[0].stride = (1, 1)
    assert block.train()(x).shape == block.eval()(x).shape == (2, 4, 8, 8)
    block = ResidualBlock(3, 4, impl=impl)  # type: ignore[arg-type]
    block.branch[0].dilation = block.branch[0].padding = (2, 2)
    with torch.no_grad():
        expected = block.branch[0](x.relu())
        seen: list[Tensor] = []
        block.branch[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        block.train()(x)
    torch.testing.assert_close(seen[0], expected)


def test_a_copy_keeps_the_modes_of_its_parts() -> None:
    encoder = pretrained_encoder("resnet18", (64, 64), weights=None)
    images = torch.rand(2, 3, 64, 64)
    copied = copy.deepcopy(encoder)
    assert not any(part.training for part in copied.modules())
    for mine, other in zip(encoder(images), copied(images), strict=True):
        torch.testing.assert_close(mine, other)
    assert next(copied.parameters()) is not next(encoder.parameters())


def test_scales_are_chosen_by_name_and_the_rest_is_left_out() -> None:
    encoder = build_encoder(ModelConfig(scales=("block2", "stem")), (16, 16), 1)
    assert encoder.names == ("stem", "block2")
    assert list(encoder.stages) == ["stem", "block1", "block2"]


@pytest.mark.parametrize(
    ("values", "argument", "text"),
    [
        ({"backbone": "resnet19"}, "backbone", "resnet18"),
        ({"scales": ("layer9",)}, "scales", "block1"),
        ({"stem": "tiny"}, "stem", "standard"),
        ({"prototypes": (8, 8)}, "prototypes", "3, one per scale"),
        ({"prototypes": ()}, "prototypes", "one number"),
        ({"prototypes": (8, 0)}, "prototypes", "≥ 1"),
        ({"projection": 0}, "projection", "≥ 3"),
        ({"normalize": "rms"}, "normalize", "layer"),
        ({"beta": float("nan")}, "beta", "finite"),
        ({"steps": 0}, "steps", "≥ 1"),
        ({"scale_weights": "log"}, "scale_weights", "linear"),
        ({"impl": "cuda"}, "impl", "triton"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], argument: str, text: str) -> None:
    with pytest.raises(ArgumentError, match=text) as caught:
        build_model(ModelConfig(**values), (16, 16), 1, [0.5], [0.5])
    assert caught.value.argument == f"model.{argument}"


def test_an_image_set_of_one_colour_has_no_spread() -> None:
    with pytest.raises(ArgumentError, match="std"):
        build_model(ModelConfig(), (16, 16), 1, [0.5], [0.0])


def test_building_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_model(ModelConfig(), (16, 16), 1, [0.5], [0.5], seed=7).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = build_model(ModelConfig(), (16, 16), 1, [0.5], [0.5], seed=7).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_description_counts_every_parameter() -> None:
    model = build_model(ModelConfig(prototypes=(4, 5, 6), projection=8), (16, 16), 1, [0.5], [0.5])
    text = describe(model)
    assert f"{parameter_count(model):,} parameters" in text.splitlines()[-1]
    assert "memory [5, 8]" in text
    assert "map [B, 32, 4, 4]" in text


def test_a_frozen_network_does_not_move() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))

    class Maps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.layers(x)]

    encoder = NetworkEncoder(Maps(), (8, 8), 1, freeze=True)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    encoder(torch.rand(4, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert NetworkEncoder(Maps(), (8, 8), 1).train().training


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(1, 16, 16), "a tensor [B, C, H, W], received shape [1, 16, 16]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "uint8, or float in [0, 1], received torch.int64"),
        (torch.zeros(2, 3, 16, 16).numpy(), "received ndarray"),
        (torch.zeros(2, 1, 16, 16), "images of 3 channels"),
    ],
)
def test_a_model_refuses_what_is_no_batch_of_images(images: Any, text: str) -> None:
    """int64 pixels up to 255 would be taken for values in [0, 1], grey images be repeated by broadcasting."""
    model = build_model(ModelConfig(), (16, 16), 3, [0.5] * 3, [0.5] * 3)
    with pytest.raises(ArgumentError, match=re.escape(text)):
        model(images)


def test_a_model_refuses_a_memory_that_its_maps_could_not_read() -> None:
    model = build_model(ModelConfig(), (16, 16), 1, [0.5], [0.5])
    memories = [*list(model.memories)[:2], HopfieldMemory(64, 4, shrink=0.1)]
    with pytest.raises(ArgumentError, match="`memories`: expected memories without shrinkage"):
        AnoMem(model.encoder, memories, list(model.projections), mean=[0], std=[1], scale_weights=model.scale_weights)


@pytest.mark.parametrize("size", [16, (16,), (0, 16), (16.0, 16.0)])
def test_a_size_is_height_and_width(size: Any) -> None:
    for make in (
        lambda: build_model(ModelConfig(), size, 1, [0.5], [0.5]),
        lambda: build_encoder(ModelConfig(), size, 1),
        lambda: NetworkEncoder(torch.nn.Identity(), size),
        lambda: pretrained_encoder("resnet18", size, weights=None),
        lambda: TiledEncoder(build_encoder(ModelConfig(), (16, 16), 1), size),
    ):
        with pytest.raises(
            ArgumentError, match=re.escape(f"`image_size`: expected (height, width) in pixels, received {size}")
        ):
            make()


def test_a_network_that_fails_is_told_which_images_it_got() -> None:
    with pytest.raises(ArgumentError, match=r"`network`: expected a network for images \[B, 3, 16, 16\].* 1 channels"):
        NetworkEncoder(torch.nn.Conv2d(1, 2, 3), (16, 16))


def test_scales_are_no_text_read_letter_by_letter() -> None:
    with pytest.raises(ArgumentError, match="`scales`: expected a sequence, received '16'"):
        pretrained_encoder("efficientnet_lite0", (64, 64), scales="16", weights=None)


def test_the_stem_has_a_relu_unless_it_is_a_scale() -> None:
    """A scale keeps both signs; the maps behind it do not change."""
    without, with_stem = (
        build_encoder(ModelConfig(scales=scales), (16, 16), 1).eval()
        for scales in (("block1", "block3"), ("stem", "block1", "block3"))
    )
    with_stem.load_state_dict(without.state_dict())
    images = torch.randn(2, 1, 16, 16)
    stem, *others = with_stem(images)
    assert (stem < 0).any()
    for mine, theirs in zip(without(images), others, strict=True):
        assert torch.equal(mine, theirs)


def layer_by_layer(block: ResidualBlock, x: Tensor) -> Tensor:
    """What a block computes, by calls of its layers."""
    activated = x.relu()
    first, norm, _, second, last = block.branch
    projection, straight_norm = block.shortcut
    return last(second(norm(first(activated))), straight_norm(projection(activated)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_block_is_its_layers(dtype: torch.dtype, training: bool) -> None:
    """The strided convolutions of a block in training are one operator, and every number is that of the layers."""
    torch.manual_seed(0)
    block = ResidualBlock(16, 24, impl="native").to(memory_format=torch.channels_last).train(training)
    x = torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)

    exact_block = copy.deepcopy(block).double()

    def run(function: Callable[[Tensor], Tensor], of: ResidualBlock = block) -> list[Tensor]:
        leaf = x.to(of.branch[0].weight).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32 and of is block):
            out = function(leaf)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *of.parameters()])]

    with torch.profiler.profile() as profile:
        got = run(block)
    names = {event.key for event in profile.key_averages()}
    assert ("anomem::native_downsample_add" in names) == training
    plain = run(lambda leaf: layer_by_layer(block, leaf))
    exact = run(lambda leaf: layer_by_layer(exact_block, leaf), exact_block)
    for mine, theirs, truth in zip(got, plain, exact, strict=True):
        assert_within_budget(mine, theirs, truth)
    if not training:
        assert torch.equal(got[0], plain[0])


def test_a_hook_on_a_strided_convolution_is_called_in_training() -> None:
    block = ResidualBlock(3, 4, impl="native").train()
    shapes = []
    for layer in (block.branch[0], block.shortcut[0]):
        layer.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    block(torch.randn(2, 3, 8, 6).contiguous(memory_format=torch.channels_last))
    assert shapes == [(2, 4, 4, 3), (2, 4, 4, 3)]
