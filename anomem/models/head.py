"""DeviationHead: the small convolutional heads of stage 2, which embed the deviation maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

POOLED_SIDE = 8
"""Larger maps are averaged down to this side before they are flattened."""


class ScaleHead(nn.Module):
    """Two 3×3 convolutions, then a linear layer over the flattened map.

    Args:
        features: d of the deviations.
        size: (H, W) of the map.
        hidden: channels of the convolutions.
        embedding: length of g(s).

    Shape:
        [B, H·W, d] -> [B, embedding].
    """

    rms: Tensor

    def __init__(self, features: int, size: tuple[int, int], hidden: int, embedding: int) -> None:
        super().__init__()
        self.size = size
        side = (min(size[0], POOLED_SIDE), min(size[1], POOLED_SIDE))
        self.convolutions = nn.Sequential(
            nn.Conv2d(features, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Identity() if side == size else nn.AdaptiveAvgPool2d(side),
        )
        self.linear = nn.Linear(hidden * side[0] * side[1], embedding)
        self.register_buffer("rms", torch.ones(()))

    def forward(self, deviation: Tensor) -> Tensor:
        """The embedding g(s) of D(s) divided by its training RMS."""
        maps = (deviation / self.rms).mT.unflatten(2, self.size)  # [B, d, H, W]
        embedding: Tensor = self.linear(self.convolutions(maps).flatten(1))
        return embedding


class DeviationHead(nn.Module):
    """One head per scale; |g(s)| is small for normal images and large for anomalies.

    Args:
        features: d_s of each scale.
        sizes: (H_s, W_s) of each.
        scale_weights: lambda_s of each.
        hidden: channels of the convolutions.
        embedding: length of g(s).

    Shape:
        S deviations [B, P_s, d_s] -> scores [B].
    """

    def __init__(
        self,
        features: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        scale_weights: Sequence[float],
        hidden: int = 32,
        embedding: int = 32,
    ) -> None:
        super().__init__()
        self.scale_weights = tuple(scale_weights)
        self.heads = nn.ModuleList(
            [ScaleHead(d, size, hidden, embedding) for d, size in zip(features, sizes, strict=True)]
        )

    @torch.no_grad()
    def fit_rms(self, batches: Iterable[Sequence[Tensor]], mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """Set the root mean square by which each scale's deviation is divided.

        Args:
            batches: S deviations [B, P_s, d_s] each, of training normals.
            mean: of numbers [n] over the processes that have further batches; None where there is one process.
        """
        sums = torch.zeros(len(self.heads), dtype=torch.float64)
        counts = torch.zeros_like(sums)
        for deviations in batches:
            sums += torch.stack([x.double().square().sum() for x in deviations]).cpu()
            counts += torch.tensor([x.numel() for x in deviations])
        if mean is not None:
            sums, counts = mean(torch.cat([sums, counts])).chunk(2)
        for head, mean_square in zip(self.heads, (sums / counts).tolist(), strict=True):
            head.get_buffer("rms").fill_(max(mean_square, 1e-12) ** 0.5)

    def lengths(self, deviations: Sequence[Tensor]) -> list[Tensor]:
        """|g(s)| of each scale: S tensors [B]."""
        # The gradient of the length is taken as zero at a zero embedding, where it has none.
        return [torch.linalg.vector_norm(head(x), dim=1) for head, x in zip(self.heads, deviations, strict=True)]

    def forward(self, deviations: Sequence[Tensor]) -> Tensor:
        """Σ lambda_s |g(s)|: [B]; higher is more anomalous."""
        lengths = self.lengths(deviations)
        return torch.stack([w * g for w, g in zip(self.scale_weights, lengths, strict=True)]).sum(dim=0)
