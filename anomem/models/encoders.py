"""Encoders: chains of stages f(1) … f(S); the maps of chosen stages are the scales (Algorithm 1, line 2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anomem.errors import ArgumentError
from anomem.functional.downsample import downsample
from anomem.models.config import DEFAULT_SCALES, STAGES, ModelConfig
from anomem.nn import BatchNorm2d, Conv3x3, replace_convolutions
from anomem.nn.batch_norm import sum_of_two
from anomem.nn.conv3x3 import is_bare
from anomem.rules import Impl
from anomem.validation import require, require_count, require_names, require_size

Norm = Callable[..., BatchNorm2d]
"""Makes the batch norm of so many channels."""
SMALL_IMAGE = 64
"""Up to this side in pixels `stem="auto"` keeps the resolution."""


class Encoder(nn.Module):
    """Base class of encoders: images -> maps of S scales, with the names and sizes of the maps.

    Attributes:
        image_size: (H, W).
        names: names of the S scales, fine to coarse.
        channels: C_s of each.
        sizes: (H_s, W_s) of each at `image_size`.
    """

    image_size: tuple[int, int]
    names: tuple[str, ...]
    channels: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        """A copy whose parts are in the modes of the original's: a copied `GraphModule` is in training mode."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for one, other in zip(self.modules(), copied.modules(), strict=True):
            other.training = one.training
        return copied

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Parts of the encoder by name, for `describe`."""
        return dict(self.named_children())

    def _probe(self, channels: int) -> list[Tensor]:
        """Maps of one blank image, in eval mode so that batch-norm statistics stay as they are."""
        training = self.training
        self.eval()
        try:
            device = next((p.device for p in self.parameters()), None)
            with torch.no_grad():
                maps: list[Tensor] = self(torch.zeros(1, channels, *self.image_size, device=device))
        finally:
            self.train(training)
        return maps

    def require_channels(self, channels: int) -> None:
        """Check that the encoder takes images of a number of channels.

        Raises:
            ArgumentError: it does not.
        """
        try:
            self._probe(channels)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            hint = "convert the images, or make it with another first layer"
            expected = f"one for images of {channels} channels"
            raise ArgumentError("encoder", expected, f"another ({reason})", hint) from error

    def _measure(self, maps: Sequence[Tensor]) -> None:
        self.channels = tuple(m.shape[1] for m in maps)
        self.sizes = tuple((m.shape[2], m.shape[3]) for m in maps)

    def _measure_scales(self, channels: int) -> None:
        """Set channels and sizes of the scales that are named.

        Raises:
            ArgumentError: the image is too small for one of them.
        """
        try:
            self._measure(self._probe(channels))
        except RuntimeError as error:
            raise ArgumentError(
                "image_size",
                f"an image with at least one position at every scale ({', '.join(self.names)})",
                f"{self.image_size[0]}x{self.image_size[1]}",
                "take larger images or finer scales",
            ) from error


class NetworkEncoder(Encoder):
    """An encoder around any network that returns feature maps.

    For example torchvision's `create_feature_extractor` or timm's `features_only`. The network is trained in place;
    parameters with `requires_grad=False` stay as they are; with `freeze` all of it does, batch norms too. It receives
    images normalised by the mean and standard deviation of the training images.

    Args:
        network: images [B, C, H, W] -> a list, tuple or dictionary of S maps [B, C_s, H_s, W_s], fine to coarse.
        image_size: (H, W) of the images.
        channels: C of the images.
        freeze: whether it stays in eval mode and without gradients.

    Shape:
        [B, C, H, W] -> S maps [B, C_s, H_s, W_s].

    Raises:
        ArgumentError: the network does not take such images, or returns anything but maps.

    Example:
        >>> network = create_feature_extractor(resnet50(weights="DEFAULT"), ["layer2", "layer3"])
        >>> encoder = NetworkEncoder(network, image_size=(224, 224))
        >>> run = train(preset("folder"), task=task, encoder=encoder)
    """

    def __init__(
        self, network: nn.Module, image_size: tuple[int, int], channels: int = 3, freeze: bool = False
    ) -> None:
        super().__init__()
        require_size(image_size, "image_size")
        self.network = network
        self.frozen = freeze
        if freeze:
            self.requires_grad_(False)
            self.train(False)
        self.image_size = image_size
        try:
            maps = self._probe(channels)
        except (RuntimeError, ValueError) as error:
            height, width = image_size
            expected = f"a network for images [B, {channels}, {height}, {width}]"
            raise ArgumentError("network", expected, f"one that fails ({str(error).splitlines()[0]})") from error
        wrong = [tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__ for m in maps if not _is_map(m)]
        expected = "a network that gives maps [B, C_s, H_s, W_s] in a list, a tuple or a dictionary"
        require(not wrong and len(maps) > 0, "network", expected, lambda: f"one that gives {wrong or 'none'}")
        self.names = tuple(f"scale{s}" for s in range(1, len(maps) + 1))
        self._measure(maps)

    def train(self, mode: bool = True) -> NetworkEncoder:
        """Training mode, unless it is frozen."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of the network."""
        maps = self.network(images)
        return list(maps.values()) if isinstance(maps, Mapping) else list(maps)


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


class MultiScaleEncoder(Encoder):
    """A chain of stages that returns the maps of the chosen stages; later stages are dropped.

    Args:
        stages: name -> module, in order.
        scales: names of the stages whose outputs are returned, in any order; at least one.
        image_size: (H, W) of the images, for `sizes`.
        channels: C of the images.

    Shape:
        [B, C, H, W] -> S maps [B, C_s, H_s, W_s], fine to coarse.

    Raises:
        ArgumentError: an unknown scale, no scale, or an image too small to have a position at every scale.
    """

    def __init__(
        self, stages: Mapping[str, nn.Module], scales: Sequence[str], image_size: tuple[int, int], channels: int
    ) -> None:
        super().__init__()
        require_size(image_size, "image_size")
        require_names(scales, "scales", tuple(stages))
        require(len(scales) > 0, "scales", "at least one of " + ", ".join(stages), "none")
        order = list(stages)
        last = max(order.index(name) for name in scales)
        self.names = tuple(name for name in order if name in scales)
        self.stages = nn.ModuleDict({name: stages[name] for name in order[: last + 1]})
        self.image_size = image_size
        self._measure_scales(channels)

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The stages by name."""
        return dict(self.stages.items())

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of the chosen scales."""
        maps, x = [], images
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.names:
                maps.append(x)
        return maps


def build_encoder(config: ModelConfig, image_size: tuple[int, int], channels: int) -> MultiScaleEncoder:
    """The encoder of a configuration, with fresh weights from torch's global generator.

    Args:
        config: backbone, stem and scales.
        image_size: (H, W) in pixels.
        channels: C of the images, 1 or more.

    Raises:
        ArgumentError: no channel, or an image too small for the scales.
    """
    require_size(image_size, "image_size")
    require_count(channels, "channels", 1)
    scales = config.scales or DEFAULT_SCALES[config.backbone]
    small_stem = config.stem == "small" or (config.stem == "auto" and max(image_size) <= SMALL_IMAGE)
    norm = partial(BatchNorm2d, impl=config.impl)
    if config.backbone == "small":
        modules = _small_stages(channels, "stem" in scales, norm, config.impl)
    elif config.backbone == "efficientnet_b0":
        modules = _efficientnet_stages(channels, small_stem, norm)
    else:
        modules = _resnet_stages(config.backbone, channels, small_stem, norm)
        for stage in modules[1:]:  # the stem has too few channels
            replace_convolutions(stage, config.impl)
    stages = dict(zip(STAGES[config.backbone], modules, strict=True))
    return MultiScaleEncoder(stages, scales, image_size, channels)


def _resnet_stages(name: str, channels: int, small_stem: bool, norm: Norm) -> list[nn.Module]:
    from torchvision.models import get_model

    net = get_model(name, weights=None, norm_layer=norm)
    if small_stem:
        convolution = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        stem = nn.Sequential(convolution, net.bn1, net.relu)
    else:
        convolution = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        stem = nn.Sequential(convolution, net.bn1, net.relu, net.maxpool)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own stem
    return [stem, net.layer1, net.layer2, net.layer3, net.layer4]


def _efficientnet_stages(channels: int, small_stem: bool, norm: Norm) -> list[nn.Module]:
    from torchvision.models import get_model

    features = get_model("efficientnet_b0", weights=None, norm_layer=norm).features
    convolution = nn.Conv2d(channels, 32, 3, stride=1 if small_stem else 2, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")  # as torchvision's own stem
    features[0][0] = convolution
    return list(features)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a 1×1 shortcut; halves the resolution.

    The activation comes first, so the map of a scale keeps both signs. LayerNorm and the cosine need both: with a
    ReLU at the end, the plain deviation lost ten points of AUROC on digits.

    Args:
        channels_in: C.
        channels_out: C'.
        activated: whether the input has passed a ReLU already.
        norm: makes the batch norms.
        impl: of `anomem.functional.downsample` and `anomem.nn.Conv3x3`, a preference.

    Shape:
        [B, C, H, W] -> [B, C', ⌈H/2⌉, ⌈W/2⌉].
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        activated: bool = False,
        norm: Norm = BatchNorm2d,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.activated, self.impl = activated, impl
        self.branch = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
            norm(channels_out, relu=True),
            nn.Identity(),  # once a ReLU of its own: keys of state dicts count it
            Conv3x3(channels_out, channels_out, impl=impl),
            norm(channels_out),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), norm(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """branch(relu(x)) + shortcut(relu(x))."""
        activated = x if self.activated else x.relu()
        (first, *branch, last), (projection, norm) = self.branch, self.shortcut
        if self.training and is_bare(first, 3, 2) and is_bare(projection, 1, 2):
            inner, straight = downsample(activated, first.weight, projection.weight, impl=self.impl, part=True)
        else:
            inner, straight = first(activated), projection(activated)
        for layer in branch:
            inner = layer(inner)
        return sum_of_two(last, inner, norm, straight)


def _small_stages(channels: int, stem_is_a_scale: bool, norm: Norm, impl: Impl) -> list[nn.Module]:
    """Stem of 16 channels at full resolution, then blocks of 16, 32 and 64: 77 392 parameters for one channel."""
    convolution = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    activated = not stem_is_a_scale
    stem = nn.Sequential(convolution, norm(16, relu=activated))
    block = partial(ResidualBlock, norm=norm, impl=impl)
    return [stem, block(16, 16, activated=activated), block(16, 32), block(32, 64)]
