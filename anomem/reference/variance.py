"""The variance term against collapse: a hinge on the standard deviation (VICReg, Bardes et al. 2022, Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def variance_hinge(x: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    """L_V = (1/d) Σ_j max(0, gamma − sqrt(Var_k(x_kj) + eps)), the unbiased variance over the batch.

    Args:
        x: [G, B, d], B ≥ 2.
        gamma: the standard deviation below which a coordinate is pushed apart; 1 for raw vectors, 1/sqrt(d) for
            L2-normalised ones.
        eps: keeps the square root differentiable at zero variance.

    Returns:
        [G].
    """
    deviation = torch.sqrt(x.var(dim=-2) + eps)  # [G, d]
    return torch.relu(gamma - deviation).mean(dim=-1)
