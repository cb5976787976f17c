"""The one-class detector: Gaussians with Ledoit–Wolf shrinkage on the deviation maps of a frozen model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from anomem.validation import require, require_choice

ROUNDING = 1e-5
"""Relative difference up to which two float32 distances count as equal."""
BLOCK = 1 << 18
"""Numbers of a temporary while Gaussians are fitted: their positions are taken in blocks."""
BYTES = 12
"""Of a number of a covariance while it is fitted: a float64 sum and a float32 whitening matrix."""
Alignment = Literal["per_position", "pooled"]
Batches = Callable[[], Iterable[Sequence[Tensor]]]
"""Each call gives the same batches of S tensors [B, P_s, d_s]."""


class DeviationDetector(nn.Module):
    """Mahalanobis distance of deviations from those of the training normals, summed over scales.

    "per_position" fits one Gaussian per position, for images whose positions are comparable; the distance of an image
    at a scale is the mean over positions. "pooled" fits one Gaussian to all positions, for the map, and a second one
    to the mean deviation of each image, for the image's distance. Each scale is divided by its standard deviation
    over the training images, or by its mean where the standard deviation is zero.

    One Gaussian per position has d² numbers. Where all of them exceed a limit, the deviations are projected to fewer
    channels first, by random orthonormal matrices that are kept with the detector (as PaDiM's random channels,
    Defard et al. 2021).

    Args:
        positions: P_s = H_s·W_s of each scale.
        features: d_s of each scale.
        alignment: "per_position" or "pooled".
        megabytes: limit of what the Gaussians take while they are fitted; a third of it is kept.

    Shape:
        S tensors [B, P_s, d_s] -> scores [B].

    Example:
        >>> detector = DeviationDetector([64, 16, 4], [16, 32, 64], "per_position")
        >>> detector.fit(lambda: [model.deviations(model(images)) for images in batches])
        >>> scores = detector(model.deviations(model(new_images)))  # [B]
    """

    spread: Tensor
    map_spread: Tensor

    def __init__(
        self, positions: Sequence[int], features: Sequence[int], alignment: Alignment, megabytes: int = 3072
    ) -> None:
        super().__init__()
        require_choice(alignment, "alignment", get_args(Alignment))
        self.alignment = alignment
        pooled = alignment == "pooled"
        kept = list(features) if pooled else kept_features(positions, features, megabytes)
        self.projected = kept != list(features)
        generator = torch.Generator().manual_seed(0)
        for s, (d, k) in enumerate(zip(features, kept, strict=True)):
            if self.projected:
                drawn = torch.randn(d, k, generator=generator, dtype=torch.float64)
                self.register_buffer(f"projection{s}", torch.linalg.qr(drawn).Q.float())
        sizes = list(zip(positions, kept, strict=True))
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
        for unprojected in batches():
            deviations = self._projected(unprojected)
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
        for unprojected in batches():
            deviations = self._projected(unprojected)
            maps = self._distances(deviations)
            image.append(torch.stack(self._image_distances(deviations, maps)))  # [S, B]
            position.append(torch.stack([m.mean(dim=1) for m in maps]))
        for buffer, values in ((self.spread, image), (self.map_spread, position)):
            distances = torch.cat(values, dim=1)  # [S, N]
            spread, typical = distances.std(dim=1), distances.mean(dim=1)
            # Two images have equal distances from their own mean: their spread is rounding error.
            fallback = torch.where(typical > 0, typical, torch.ones_like(typical))
            buffer.copy_(torch.where(spread > ROUNDING * typical, spread, fallback))

    def forward(self, deviations: Sequence[Tensor]) -> Tensor:
        """Image scores [B]; higher is more anomalous."""
        deviations = self._projected(deviations)
        distances = torch.stack(self._image_distances(deviations, self._distances(deviations)))
        return (distances / self.spread[:, None]).sum(dim=0)

    def distances(self, deviations: Sequence[Tensor]) -> list[Tensor]:
        """Mahalanobis distance at every position: S tensors [B, P_s, d_s] -> S tensors [B, P_s]."""
        return self._distances(self._projected(deviations))

    def _projected(self, deviations: Sequence[Tensor]) -> list[Tensor]:
        """S tensors [B, P_s, d_s] -> [B, P_s, kept]."""
        if not self.projected:
            return list(deviations)
        return [x.float() @ self.get_buffer(f"projection{s}") for s, x in enumerate(deviations)]

    def _distances(self, deviations: Sequence[Tensor]) -> list[Tensor]:
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


def kept_features(positions: Sequence[int], features: Sequence[int], megabytes: int) -> list[int]:
    """Channels to which each scale is projected, so that Σ P_s k_s² numbers fit while they are fitted; all where they
    fit already.

    Args:
        positions: P_s.
        features: d_s.
        megabytes: the limit.
    """
    numbers = sum(p * d**2 for p, d in zip(positions, features, strict=True))
    share = math.sqrt(min(1.0, megabytes * 2**20 / BYTES / numbers))
    return [max(1, int(d * share)) for d in features]


class MomentSums:
    """Running float64 sums that give mean, covariance and optimal shrinkage of P Gaussians in one pass.

    Rows are taken relative to the mean of the first batch, so that the fourth moments do not cancel.

    Args:
        positions: P, how many Gaussians.
        features: d.
        device: where the sums are kept.
    """

    def __init__(self, positions: int, features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.origin: Tensor | None = None  # [P, 1, d]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(positions, *shape, dtype=torch.float64, device=device)

        self.first = zeros(features)  # Σ x
        self.second = zeros(features, features)  # Σ x xᵀ
        self.third = zeros(features)  # Σ |x|² x
        self.fourth = zeros()  # Σ |x|⁴

    def update(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: [N, P, d].
        """
        if self.origin is None:
            self.origin = x.transpose(0, 1).double().mean(dim=1, keepdim=True)
        self.count += x.shape[0]
        for part in self.blocks(x.shape[0] * x.shape[2]):
            rows = x[:, part].transpose(0, 1).double() - self.origin[part]  # [p, N, d]
            square = rows.square().sum(dim=-1)  # [p, N]
            self.first[part] += rows.sum(dim=1)
            self.second[part] += rows.mT @ rows
            self.third[part] += (square[..., None] * rows).sum(dim=1)
            self.fourth[part] += square.square().sum(dim=1)

    def blocks(self, numbers: int) -> Iterator[slice]:
        """The P positions in parts.

        Args:
            numbers: that a temporary has for each position.
        """
        positions, size = len(self.fourth), max(1, BLOCK // max(1, numbers))
        return (slice(start, start + size) for start in range(0, positions, size))

    def gaussian(self, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, shrunk covariance and shrinkage (Ledoit and Wolf 2004, Eqs. 5 to 14, as scikit-learn's).

        Args:
            part: of the P positions; all of them by default.

        Returns:
            mean [P, d], covariance [P, d, d], shrinkage [P] in [0, 1]; all float64.

        Raises:
            ArgumentError: fewer than two rows were seen.
        """
        require(self.count >= 2 and self.origin is not None, "images", "at least two to fit a Gaussian", self.count)
        assert self.origin is not None
        n, features = self.count, self.first.shape[-1]
        first, second = self.first[part], self.second[part]
        m = first / n  # [P, d]
        covariance = second / n - m[:, :, None] * m[:, None, :]
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # [P]
        scale = trace / features
        frobenius = covariance.square().sum(dim=(-2, -1))
        # Σ |x − m|⁴ expanded in the raw sums.
        length = m.square().sum(dim=-1)
        squares = second.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        projected = (m[:, None, :] @ second @ m[:, :, None])[:, 0, 0]
        fourth = (
            self.fourth[part]
            + 4 * projected
            + 2 * length * squares
            - 4 * (m * self.third[part]).sum(dim=-1)
            - 3 * n * length.square()
        )
        distance = (frobenius - trace * scale) / features  # of the covariance from a multiple of the identity
        error = (fourth / n - frobenius) / (features * n)  # of the covariance as an estimate
        shrinkage = torch.where(distance > 0, torch.minimum(error, distance) / distance, torch.ones_like(error))
        shrinkage = shrinkage.clamp(0, 1)
        eye = torch.eye(features, dtype=torch.float64, device=m.device)
        shrunk = (1 - shrinkage)[:, None, None] * covariance + (shrinkage * scale)[:, None, None] * eye
        return m + self.origin[part, 0], shrunk, shrinkage


class Gaussians(nn.Module):
    """P Gaussians as mean and whitening matrix; gives Mahalanobis distances.

    Args:
        positions: P; one Gaussian serves any number of positions.
        features: d.

    Shape:
        [B, P', d] -> [B, P'] with P' = P, or any P' when P = 1.

    Attributes:
        mean: [P, d] buffer.
        whitening: [P, d, d] buffer, W with W Σ Wᵀ = 1, lower triangular.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, positions: int, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(positions, features))
        # Its columns are adjacent in memory: products with Wᵀ are faster so.
        self.register_buffer("whitening", torch.eye(features).repeat(positions, 1, 1).mT)

    def fit(self, sums: MomentSums) -> None:
        """Take mean and covariance from sums; a direction without variance gets the smallest one in float32.

        Raises:
            ArgumentError: fewer than two rows, or values too large for a covariance.
        """
        for part in sums.blocks(sums.second.shape[-1] ** 2):
            mean, covariance, _ = sums.gaussian(part)
            eps = torch.finfo(torch.float32).eps
            # Features are of the order of 1: what differs by less than their rounding is equal. Identical images have
            # no variance at all, and distances in units of it would overflow.
            level = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(eps)
            floor = eps * level
            eye = torch.eye(mean.shape[-1], dtype=torch.float64, device=mean.device)
            factor, failed = torch.linalg.cholesky_ex(covariance + floor[:, None, None] * eye)
            whitening = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
            self.mean[part] = mean.float()
            self.whitening[part] = whitening.float()
            finite = self.mean[part].isfinite().all() & self.whitening[part].isfinite().all()
            require(
                bool(finite & (failed == 0).all()),
                "images",
                "deviations of which a covariance can be taken",
                "NaN, infinity or numbers too large",
                "the training has diverged: lower the learning rate",
            )

    def forward(self, x: Tensor, unit: Tensor | None = None) -> Tensor:
        """Mahalanobis distance of each row from its Gaussian.

        Args:
            x: [B, P', d].
            unit: [B, P', 1], of the rows; 1 when None.
        """
        rows = x.float()
        centred = rows - self.mean if unit is None else torch.addcmul(-self.mean, rows, unit)
        centred = centred.transpose(0, 1)  # [P', B, d]
        # W is lower triangular: a quarter of the product is saved.
        half = x.shape[2] // 32 * 16
        blocks = [(centred[..., :half], self.whitening[:, :half, :half])] if half else []
        blocks.append((centred, self.whitening[:, half:]))
        # One Gaussian broadcasts over P'.
        parts = [torch.linalg.vector_norm(columns @ rows.mT, dim=-1) for columns, rows in blocks]
        length: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0).T  # ONNX has no hypot
        return length
