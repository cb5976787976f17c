"""AnoMem: an encoder with a memory of prototypes at every scale; and its description as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anomem import functional as AF
from anomem.models.config import ModelConfig
from anomem.models.encoders import Encoder, build_encoder
from anomem.nn import HopfieldMemory
from anomem.reference.deviation_map import Distance
from anomem.validation import require, require_images, require_size


class Memories(nn.ModuleList):
    """The memories of all scales, fine to coarse: a module list that type checkers know to hold `HopfieldMemory`."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[HopfieldMemory]: ...

        def __getitem__(self, index: int) -> HopfieldMemory: ...  # type: ignore[override]


class AnoMem(nn.Module):
    """Encoder, memories, and the projections between them.

    Args:
        encoder: images -> S maps.
        memories: S memories, of width d_s.
        projections: S modules [..., C_s] -> [..., d_s], `nn.Identity` where d_s = C_s. They act on vectors, so a
            training step projects the sampled positions only.
        mean: per channel, subtracted from images in [0, 1].
        std: per channel, divides them.
        scale_weights: lambda_s, S numbers.

    Shape:
        images [B, C, H, W], uint8 or float in [0, 1] -> S maps [B, C_s, H_s, W_s].

    Raises:
        ArgumentError: parts for another number of scales, memories with shrinkage, or a standard deviation of 0; in the
            call anything but such images.

    Example:
        >>> model = build_model(ModelConfig(), (16, 16), 1, mean=[0.5], std=[0.2]).eval()
        >>> maps = model(torch.rand(8, 1, 16, 16))  # [8, 16, 8, 8], [8, 32, 4, 4], [8, 64, 2, 2]
        >>> deviations = model.deviations(maps)  # [8, 64, 16], [8, 16, 32], [8, 4, 64]
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        memories: Sequence[HopfieldMemory],
        projections: Sequence[nn.Module],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        scale_weights: Sequence[float],
    ) -> None:
        super().__init__()
        scales = len(encoder.names)
        for name, parts in (("memories", memories), ("projections", projections), ("scale_weights", scale_weights)):
            require(len(parts) == scales, name, lambda: f"{scales}, one per scale", len(parts))
        # A deviation map knows no shrinkage: the two scores would read two different memories.
        plain = all(memory.shrink == 0 for memory in memories)
        require(plain, "memories", "memories without shrinkage", lambda: [memory.shrink for memory in memories])
        require(all(s > 0 for s in std), "std", "positive numbers", std, "an image set of one colour has no spread")
        self.encoder = encoder
        self.memories = Memories(memories)
        self.projections = nn.ModuleList(projections)
        self.scale_weights = tuple(scale_weights)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.mean.device

    @property
    def features(self) -> list[int]:
        """d_s of each scale."""
        return [memory.prototypes.shape[1] for memory in self.memories]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of the images, which are normalised first."""
        channels = len(self.mean)
        require_images(images, "images")
        require(channels in (1, images.shape[1]), "images", lambda: f"images of {channels} channels", images)
        if images.dtype == torch.uint8:
            images = images / 255
        maps: list[Tensor] = self.encoder(self.standardized(images))
        return maps

    def standardized(self, images: Tensor) -> Tensor:
        """(images − mean) / std of each channel."""
        mean, std = self.mean, self.std
        layout = torch.channels_last
        if len(mean) > 1 and not torch.compiler.is_compiling() and images.is_contiguous(memory_format=layout):
            # Broadcast over the batch alone: over adjacent channels torch's loops are as short as their number.
            mean, std = (x.expand(1, *images.shape[1:]).contiguous(memory_format=layout) for x in (mean, std))
        return (images - mean).div_(std)

    def sample(self, maps: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """The projected vectors at sampled positions of every scale.

        Args:
            maps: S maps [B, C_s, H_s, W_s].
            positions: S index tensors [n_s] or [B, n_s].

        Returns:
            S tensors [n_s, B, d_s].
        """
        return [
            projection(AF.gather_positions(m, p, impl=memory.impl, part=True))
            for m, p, projection, memory in zip(maps, positions, self.projections, self.memories, strict=True)
        ]

    def queries(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The projected vectors at all positions: S maps [B, C_s, H_s, W_s] -> S tensors [B, H_s·W_s, d_s]."""
        return [p(m.flatten(2).mT) for m, p in zip(maps, self.projections, strict=True)]

    def deviations(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """D(s) = norm(z) − HF(z) at all positions: S maps [B, C_s, H_s, W_s] -> S tensors [B, H_s·W_s, d_s]."""
        return [memory.deviation(query) for query, memory in zip(self.queries(maps), self.memories, strict=True)]

    def distances(
        self, maps: Sequence[Tensor], distance: Distance, log_priors: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """dev(z, HF(z)) at all positions, without gradient.

        Args:
            maps: S maps [B, C_s, H_s, W_s].
            distance: "cosine" or "l2".
            log_priors: S tensors [H_s·W_s, M_s], the location prior; None is a uniform prior.

        Returns:
            S tensors [B, H_s, W_s].
        """
        priors = [None] * len(maps) if log_priors is None else log_priors
        result = []
        for m, query, memory, prior in zip(maps, self.queries(maps), self.memories, priors, strict=True):
            projected = query.mT.unflatten(2, m.shape[2:])  # [B, d, H, W]
            result.append(
                AF.deviation_map(
                    projected,
                    memory.prototypes,
                    values=memory.values,
                    beta=memory.beta,
                    steps=memory.steps,
                    normalize=memory.normalize,
                    distance=distance,
                    log_prior=prior,
                    impl=memory.impl,
                    part=True,
                )
            )
        return result


def build_model(
    config: ModelConfig,
    image_size: tuple[int, int],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    encoder: Encoder | None = None,
) -> AnoMem:
    """A fresh model; the same seed gives the same weights, and torch's global generator is left as it was.

    Args:
        config: what to build.
        image_size: (H, W) in pixels.
        channels: C of the images.
        mean: per channel, of the training images in [0, 1].
        std: per channel.
        seed: of the initial weights and prototypes.
        encoder: your own, used with its weights in place of the configuration's backbone.

    Raises:
        ArgumentError: an encoder for images of another size or number of channels, or numbers of prototypes for another
            number of scales.
    """
    require_size(image_size, "image_size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = encoder is not None
        encoder = encoder or build_encoder(config, image_size, channels)
        fits = encoder.image_size == image_size
        require(fits, "encoder", lambda: f"one for images of {image_size}", encoder.image_size)
        if own:
            encoder.require_channels(channels)
        scales = len(encoder.names)
        counts = config.prototypes * scales if len(config.prototypes) == 1 else config.prototypes
        require(len(counts) == scales, "model.prototypes", f"one number, or {scales}, one per scale", config.prototypes)
        widths = [config.projection or c for c in encoder.channels]
        memories = [
            HopfieldMemory(
                width,
                count,
                beta=config.beta,
                steps=config.steps,
                normalize=config.normalize,
                learn_beta=config.learn_beta,
                value_features=width if config.separate_values else None,
                impl=config.impl,
            )
            for width, count in zip(widths, counts, strict=True)
        ]
        projections = [
            nn.Identity() if config.projection is None else nn.Linear(c, width, bias=False)
            for c, width in zip(encoder.channels, widths, strict=True)
        ]
    weights = AF.scale_weights(scales, config.scale_weights)
    return AnoMem(encoder, memories, projections, mean=mean, std=std, scale_weights=weights)


def parameter_count(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def describe(model: AnoMem) -> str:
    """Stages, scales and memories with shapes and parameter counts, one line each."""
    encoder = model.encoder
    lines = [f"{'encoder':<12} {parameter_count(encoder):>12,} parameters"]
    lines += [f"  {name:<10} {parameter_count(stage):>12,}" for name, stage in encoder.parts.items()]
    scales = zip(encoder.names, encoder.channels, encoder.sizes, model.memories, model.scale_weights, strict=True)
    for name, channels, (height, width), memory, weight in scales:
        prototypes, features = memory.prototypes.shape
        lines.append(
            f"scale {name:<10} map [B, {channels}, {height}, {width}], memory [{prototypes}, {features}] "
            f"{parameter_count(memory):>9,} parameters, lambda {weight:g}"
        )
    projections = parameter_count(model.projections)
    if projections:
        lines.append(f"{'projections':<12} {projections:>12,} parameters")
    lines.append(f"{'total':<12} {parameter_count(model):>12,} parameters")
    return "\n".join(lines)
