"""Encoders as chains f(1) … f(S) of which chosen stages are scales (Algorithm 1, line 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anomem.errors import ArgumentError
from anomem.models.config import ModelConfig
from anomem.models.small import small_stages
from anomem.validation import require, require_choice, require_count

SMALL_IMAGE = 64
"""Up to this side in pixels the stem keeps the resolution."""
DEFAULT_SCALES: dict[str, tuple[str, ...]] = {
    "small": ("block1", "block2", "block3"),
    "resnet18": ("layer2", "layer3", "layer4"),
    "resnet50": ("layer2", "layer3", "layer4"),
    "efficientnet_b0": ("stage3", "stage5", "stage7"),
}


class Encoder(nn.Module):
    """What AnoMem asks of an encoder: images -> the maps of S scales, and what is known about those maps.

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

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The encoder's parts by name, for people."""
        return dict(self.named_children())

    def _probe(self, channels: int) -> list[Tensor]:
        """The maps of one blank image; in eval mode, so that no statistics change."""
        training = self.training
        self.eval()
        try:
            device = next((p.device for p in self.parameters()), None)
            with torch.no_grad():
                maps: list[Tensor] = self(torch.zeros(1, channels, *self.image_size, device=device))
        finally:
            self.train(training)
        return maps

    def _measure(self, maps: Sequence[Tensor]) -> None:
        self.channels = tuple(m.shape[1] for m in maps)
        self.sizes = tuple((m.shape[2], m.shape[3]) for m in maps)


class NetworkEncoder(Encoder):
    """Any network that gives feature maps, such as torchvision's `create_feature_extractor` or timm's `features_only`.

    Its weights, pretrained or not, are trained in place; parameters that require no gradient stay as they are. Images
    come normalised by the mean and deviation of the training images.

    Args:
        network: images [B, C, H, W] -> a list, tuple or dictionary of S maps [B, C_s, H_s, W_s], fine to coarse.
        image_size: (H, W) of the images.
        channels: C of the images.

    Shape:
        [B, C, H, W] -> S maps [B, C_s, H_s, W_s].

    Raises:
        ArgumentError: the network gives anything else than maps.
    """

    def __init__(self, network: nn.Module, image_size: tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        self.network = network
        self.image_size = image_size
        found = self._probe(channels)
        wrong = [tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__ for m in found if not _is_map(m)]
        expected = "a network that gives maps [B, C_s, H_s, W_s] in a list, a tuple or a dictionary"
        require(not wrong and len(found) > 0, "network", expected, lambda: f"one that gives {wrong or 'none'}")
        self.names = tuple(f"scale{s}" for s in range(1, len(found) + 1))
        self._measure(found)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The network's maps."""
        found = self.network(images)
        return list(found.values()) if isinstance(found, Mapping) else list(found)


def _is_map(found: object) -> bool:
    return isinstance(found, Tensor) and found.dim() == 4


class MultiScaleEncoder(Encoder):
    """A chain of stages that returns the maps of the chosen ones; stages after the last chosen one are left out.

    Args:
        stages: name -> module, in order.
        scales: names of the stages whose outputs are returned, in any order.
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
        require(len(scales) > 0, "scales", "at least one of " + ", ".join(stages), "none")
        for name in scales:
            require_choice(name, "scales", tuple(stages))
        order = list(stages)
        last = max(order.index(name) for name in scales)
        self.names = tuple(name for name in order if name in scales)
        self.stages = nn.ModuleDict({name: stages[name] for name in order[: last + 1]})
        self.image_size = image_size
        try:
            self._measure(self._probe(channels))
        except RuntimeError as error:
            raise ArgumentError(
                "image_size",
                f"an image with at least one position at every scale ({', '.join(self.names)})",
                f"{image_size[0]}x{image_size[1]}",
                "take larger images or finer scales",
            ) from error

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
    """The encoder a configuration names, with fresh weights from torch's global generator.

    Args:
        config: backbone, stem and scales.
        image_size: (H, W) in pixels.
        channels: C of the images, 1 or more.

    Raises:
        ArgumentError: an unknown backbone, stem or scale.
    """
    require_choice(config.backbone, "backbone", tuple(DEFAULT_SCALES))
    require_choice(config.stem, "stem", ("auto", "small", "standard"))
    require_count(channels, "channels", 1)
    small_stem = config.stem == "small" or (config.stem == "auto" and max(image_size) <= SMALL_IMAGE)
    if config.backbone == "small":
        stages = small_stages(channels)
    elif config.backbone == "efficientnet_b0":
        stages = _efficientnet_stages(channels, small_stem)
    else:
        stages = _resnet_stages(config.backbone, channels, small_stem)
    return MultiScaleEncoder(stages, config.scales or DEFAULT_SCALES[config.backbone], image_size, channels)


def _resnet_stages(name: str, channels: int, small_stem: bool) -> dict[str, nn.Module]:
    from torchvision.models import get_model

    net = get_model(name, weights=None)
    if small_stem:
        convolution = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        stem = nn.Sequential(convolution, net.bn1, net.relu)
    else:
        convolution = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        stem = nn.Sequential(convolution, net.bn1, net.relu, net.maxpool)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own stem
    return {"stem": stem, "layer1": net.layer1, "layer2": net.layer2, "layer3": net.layer3, "layer4": net.layer4}


def _efficientnet_stages(channels: int, small_stem: bool) -> dict[str, nn.Module]:
    from torchvision.models import get_model

    features = get_model("efficientnet_b0", weights=None).features
    convolution = nn.Conv2d(channels, 32, 3, stride=1 if small_stem else 2, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")  # as torchvision's own stem
    features[0][0] = convolution
    names = ["stem", *(f"stage{i}" for i in range(1, 9))]
    return dict(zip(names, features, strict=True))
