"""AnoMem itself: an encoder with a memory of prototypes at every scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomem import functional as F
from anomem.models.config import ModelConfig
from anomem.models.encoders import Encoder, build_encoder
from anomem.nn import HopfieldMemory
from anomem.reference.deviation_map import Distance
from anomem.validation import require, require_count


class AnoMem(nn.Module):
    """Encoder, memories and what stands between them.

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
        require(all(s > 0 for s in std), "std", "positive numbers", std, "an image set of one colour has no spread")
        self.encoder = encoder
        self.memories = nn.ModuleList(memories)
        self.projections = nn.ModuleList(projections)
        self.scale_weights = tuple(scale_weights)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    def forward(self, images: Tensor) -> list[Tensor]:
        """The encoder's maps of normalised images."""
        if images.dtype == torch.uint8:
            images = images / 255
        maps: list[Tensor] = self.encoder((images - self.mean) / self.std)
        return maps

    def sample(self, maps: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """The projected vectors at sampled positions of every scale.

        Args:
            maps: S maps [B, C_s, H_s, W_s].
            positions: S index tensors [n_s] or [B, n_s].

        Returns:
            S tensors [n_s, B, d_s].
        """
        return [
            projection(F.gather_positions(m, p, impl=memory.impl, part=True))
            for m, p, projection, memory in zip(maps, positions, self.projections, self.hopfield, strict=True)
        ]

    def queries(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The projected vectors at all positions: S maps [B, C_s, H_s, W_s] -> S tensors [B, H_s·W_s, d_s]."""
        return [p(m.flatten(2).mT) for m, p in zip(maps, self.projections, strict=True)]

    def deviations(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """D(s) = norm(z) − HF(z) at all positions: S maps [B, C_s, H_s, W_s] -> S tensors [B, H_s·W_s, d_s]."""
        return [memory.deviation(query) for query, memory in zip(self.queries(maps), self.hopfield, strict=True)]

    def distances(
        self, maps: Sequence[Tensor], distance: Distance, log_priors: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """dev(z, HF(z)) at all positions, without gradient.

        Args:
            maps: S maps [B, C_s, H_s, W_s].
            distance: "cosine" or "l2".
            log_priors: S tensors [H_s·W_s, M_s], the location prior; None for none.

        Returns:
            S tensors [B, H_s, W_s].
        """
        priors = [None] * len(maps) if log_priors is None else log_priors
        result = []
        for m, query, memory, prior in zip(maps, self.queries(maps), self.hopfield, priors, strict=True):
            projected = query.mT.unflatten(2, m.shape[2:])  # [B, d, H, W]
            result.append(
                F.deviation_map(
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

    @property
    def hopfield(self) -> list[HopfieldMemory]:
        """The S memories."""
        return [memory for memory in self.memories if isinstance(memory, HopfieldMemory)]


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
        encoder: one of your own instead of the configuration's, taken with its weights.

    Raises:
        ArgumentError: an encoder for images of another size, an unknown name, or a number of prototypes that fits
            neither one scale nor all.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = encoder or build_encoder(config, image_size, channels)
        fits = encoder.image_size == tuple(image_size)
        require(fits, "encoder", lambda: f"one for images of {tuple(image_size)}", encoder.image_size)
        scales = len(encoder.names)
        counts = config.prototypes * scales if len(config.prototypes) == 1 else config.prototypes
        require(len(counts) == scales, "prototypes", f"one number, or {scales}, one per scale", config.prototypes)
        if config.projection is not None:
            require_count(config.projection, "projection", 1)
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
    weights = F.scale_weights(scales, config.scale_weights)
    return AnoMem(encoder, memories, projections, mean=mean, std=std, scale_weights=weights)
