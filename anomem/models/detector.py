"""The one-class detector: Gaussians on the deviation maps of a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from anomem.models.gaussian import Gaussians, MomentSums
from anomem.validation import require, require_choice

ROUNDING = 1e-5
"""Distances that differ by no more than this part of themselves are equal in float32."""
Alignment = Literal["per_position", "pooled"]
Batches = Callable[[], Iterable[Sequence[Tensor]]]
"""Gives, each time it is called, the same batches of S tensors [B, P_s, d_s]."""


class DeviationDetector(nn.Module):
    """Mahalanobis distance of deviations from those of the training normals, summed over scales.

    "per_position": one Gaussian per position, for images whose positions are comparable; an image's distance at a
    scale is the mean over positions. "pooled": one Gaussian for all positions, which gives the map; the image's
    distance is that of its mean deviation from a second Gaussian. Each scale is divided by its spread (standard
    deviation) over the training images, or by its mean where there is no spread.

    Args:
        positions: P_s = H_s·W_s of each scale.
        features: d_s of each scale.
        alignment: "per_position" or "pooled".

    Shape:
        S tensors [B, P_s, d_s] -> scores [B].
    """

    spread: Tensor
    map_spread: Tensor

    def __init__(self, positions: Sequence[int], features: Sequence[int], alignment: Alignment) -> None:
        super().__init__()
        require_choice(alignment, "alignment", ("per_position", "pooled"))
        self.alignment = alignment
        pooled = alignment == "pooled"
        sizes = list(zip(positions, features, strict=True))
        self.local = nn.ModuleList([Gaussians(1 if pooled else p, d) for p, d in sizes])
        self.whole = nn.ModuleList([Gaussians(1, d) for _, d in sizes] if pooled else [])
        self.register_buffer("spread", torch.ones(len(sizes)))
        self.register_buffer("map_spread", torch.ones(len(sizes)))

    @torch.no_grad()
    def fit(self, batches: Batches) -> None:
        """Fit to the deviations of normal images: one pass for the Gaussians, one for the spreads.

        Args:
            batches: called twice; each time the same batches of S tensors [B, P_s, d_s].

        Raises:
            ArgumentError: fewer than two images.
        """
        local: list[MomentSums] = []
        whole: list[MomentSums] = []
        for deviations in batches():
            if not local:
                count = [1 if self.alignment == "pooled" else x.shape[1] for x in deviations]
                local = [MomentSums(p, x.shape[2], x.device) for p, x in zip(count, deviations, strict=True)]
                whole = [MomentSums(1, x.shape[2], x.device) for x in deviations]
            for x, sums, mean_sums in zip(deviations, local, whole, strict=True):
                sums.update(x.flatten(0, 1)[:, None] if self.alignment == "pooled" else x)
                mean_sums.update(x.mean(dim=1, keepdim=True))
        require(len(local) > 0, "images", "at least two to fit a Gaussian", 0)
        for gaussians, sums in zip([*self.local, *self.whole], [*local, *whole], strict=False):
            assert isinstance(gaussians, Gaussians)
            gaussians.fit(sums)
        self._fit_spreads(batches)

    def _fit_spreads(self, batches: Batches) -> None:
        image, position = [], []
        for deviations in batches():
            maps = self.distances(deviations)
            image.append(torch.stack(self._image_distances(deviations, maps)))  # [S, B]
            position.append(torch.stack([m.mean(dim=1) for m in maps]))
        for buffer, values in ((self.spread, image), (self.map_spread, position)):
            distances = torch.cat(values, dim=1)  # [S, N]
            spread, typical = distances.std(dim=1), distances.mean(dim=1)
            # Two images are equally far from their own mean: what is left then is rounding, not spread.
            instead = torch.where(typical > 0, typical, torch.ones_like(typical))
            buffer.copy_(torch.where(spread > ROUNDING * typical, spread, instead))

    def forward(self, deviations: Sequence[Tensor]) -> Tensor:
        """Image scores [B]; higher is more anomalous."""
        distances = torch.stack(self._image_distances(deviations, self.distances(deviations)))
        return (distances / self.spread[:, None]).sum(dim=0)

    def distances(self, deviations: Sequence[Tensor]) -> list[Tensor]:
        """Mahalanobis distance at every position: S tensors [B, P_s, d_s] -> S tensors [B, P_s]."""
        return [gaussians(x) for gaussians, x in zip(self.local, deviations, strict=True)]

    def maps(self, deviations: Sequence[Tensor]) -> list[Tensor]:
        """Distances in units of each scale's spread, for localisation: S tensors [B, P_s]."""
        distances = self.distances(deviations)
        return [m / spread for m, spread in zip(distances, self.map_spread, strict=True)]

    def _image_distances(self, deviations: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        """S tensors [B]."""
        if self.alignment == "per_position":
            return [m.mean(dim=1) for m in maps]
        return [g(x.mean(dim=1, keepdim=True))[:, 0] for g, x in zip(self.whole, deviations, strict=True)]
