"""Gaussians with Ledoit–Wolf shrinkage, one per position, fitted in one pass over batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anomem.validation import require


class MomentSums:
    """Running sums, in float64, from which mean, covariance and the optimal shrinkage of P Gaussians follow.

    Sums of parts of a data set add up to the sums of the whole, so batches and processes can be joined. Rows are
    taken relative to the first batch's mean, which keeps the fourth moments from cancelling.

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
        rows = x.transpose(0, 1).double()  # [P, N, d]
        if self.origin is None:
            self.origin = rows.mean(dim=1, keepdim=True)
        rows = rows - self.origin
        square = rows.square().sum(dim=-1)  # [P, N]
        self.count += x.shape[0]
        self.first += rows.sum(dim=1)
        self.second += rows.mT @ rows
        self.third += (square[..., None] * rows).sum(dim=1)
        self.fourth += square.square().sum(dim=1)

    def gaussian(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, shrunk covariance and shrinkage (Ledoit and Wolf 2004, Eqs. 5 to 14, as scikit-learn's).

        Returns:
            mean [P, d], covariance [P, d, d], shrinkage [P] in [0, 1]; all float64.

        Raises:
            ArgumentError: fewer than two rows were seen.
        """
        require(self.count >= 2 and self.origin is not None, "images", "at least two to fit a Gaussian", self.count)
        assert self.origin is not None
        n, features = self.count, self.first.shape[-1]
        m = self.first / n  # [P, d]
        covariance = self.second / n - m[:, :, None] * m[:, None, :]
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # [P]
        scale = trace / features
        frobenius = covariance.square().sum(dim=(-2, -1))
        # Σ |x − m|⁴ expanded in the raw sums.
        length = m.square().sum(dim=-1)
        squares = self.second.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        along = (m[:, None, :] @ self.second @ m[:, :, None])[:, 0, 0]
        fourth = (
            self.fourth + 4 * along + 2 * length * squares - 4 * (m * self.third).sum(dim=-1) - 3 * n * length.square()
        )
        distance = (frobenius - trace * scale) / features  # of the covariance from a multiple of the identity
        error = (fourth / n - frobenius) / (features * n)  # of the covariance as an estimate
        shrinkage = torch.where(distance > 0, torch.minimum(error, distance) / distance, torch.ones_like(error))
        shrinkage = shrinkage.clamp(0, 1)
        eye = torch.eye(features, dtype=torch.float64, device=m.device)
        shrunk = (1 - shrinkage)[:, None, None] * covariance + (shrinkage * scale)[:, None, None] * eye
        return m + self.origin[:, 0], shrunk, shrinkage


class Gaussians(nn.Module):
    """P Gaussians as mean and whitening matrix; gives Mahalanobis distances.

    Args:
        positions: P; one Gaussian serves any number of positions.
        features: d.

    Shape:
        [B, P', d] -> [B, P'] with P' = P, or any P' when P = 1.

    Attributes:
        mean: [P, d] buffer.
        whitening: [P, d, d] buffer, W with W Σ Wᵀ = 1.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, positions: int, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(positions, features))
        self.register_buffer("whitening", torch.eye(features).repeat(positions, 1, 1))

    def fit(self, sums: MomentSums) -> None:
        """Take mean and covariance from sums; a direction in which nothing varies is given the smallest spread."""
        mean, covariance, _ = sums.gaussian()
        floor = torch.finfo(torch.float32).eps * covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(1e-30)
        eye = torch.eye(mean.shape[-1], dtype=torch.float64, device=mean.device)
        factor = torch.linalg.cholesky(covariance + floor[:, None, None] * eye)
        self.mean.copy_(mean)
        self.whitening.copy_(torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False))

    def forward(self, x: Tensor) -> Tensor:
        """Mahalanobis distance of each row from its Gaussian."""
        centred = (x.float() - self.mean).transpose(0, 1)  # [P', B, d]
        whitened = centred @ self.whitening.mT  # one Gaussian broadcasts over P'
        length: Tensor = torch.linalg.vector_norm(whitened, dim=-1).T
        return length
