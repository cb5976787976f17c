"""Sampling of positions from feature maps (Algorithm 1, line 3) and the variance term on what was sampled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomem.reference.retrieve import l2_normalize


def sample_positions(
    height: int,
    width: int,
    ratio: float,
    *,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """n = max(1, floor(H·W·ratio)) distinct positions, uniform, as flat indices h·W + w.

    Args:
        height: H of the map.
        width: W of the map.
        ratio: sampling ratio r of the scale, in (0, 1].
        batch: None for one draw that serves the whole batch (the default of AnoMem), B for one draw per image.
        generator: source of randomness, on `device`.
        device: where the indices are made.

    Returns:
        [n] int64, or [B, n] for a draw per image.
    """
    # 0.29 of 100 positions are 29, which the product in floating point falls short of.
    count = max(1, math.floor(round(height * width * ratio, 9)))
    keys = torch.rand(batch or 1, height * width, generator=generator, device=device)
    positions = keys.argsort(dim=-1)[:, :count]  # distinct by construction
    return positions if batch is not None else positions[0]


def gather_positions(feature_map: Tensor, positions: Tensor, *, normalize: bool = False) -> Tensor:
    """The vectors of a map at the sampled positions, one group per position.

    Args:
        feature_map: [B, C, H, W].
        positions: [n] int64 for all images, or [B, n] for each image.
        normalize: L2-normalise each vector.

    Returns:
        [n, B, C].
    """
    channels = feature_map.shape[1]
    flat = feature_map.flatten(2)  # [B, C, HW]
    if feature_map.stride(1) == 1:  # channels-last
        # A gradient gets the layout of what is indexed; the encoder's layers are slow where it is not the map's.
        rows = flat.transpose(1, 2)  # [B, HW, C]
        each = positions.unsqueeze(2).expand(-1, -1, channels) if positions.dim() == 2 else None  # [B, n, C]
        picked = rows.index_select(1, positions) if each is None else rows.gather(1, each)  # [B, n, C]
        vectors = picked.transpose(0, 1)  # [n, B, C]
    else:
        each = positions.unsqueeze(1).expand(-1, channels, -1) if positions.dim() == 2 else None  # [B, C, n]
        picked = flat.index_select(2, positions) if each is None else flat.gather(2, each)  # [B, C, n]
        vectors = picked.permute(2, 0, 1)
    return l2_normalize(vectors) if normalize else vectors


def variance_hinge(x: Tensor, gamma: float | Tensor = 1.0, eps: float | Tensor = 1e-4) -> Tensor:
    """L_V = (1/d) Σ_j max(0, gamma − sqrt(Var_k(x_kj) + eps)), the unbiased variance over the batch.

    The hinge against collapse of VICReg (Bardes et al. 2022, Eq. 1).

    Args:
        x: [G, B, d], B ≥ 2.
        gamma: the standard deviation below which a coordinate is pushed apart; 1 for raw vectors, 1/sqrt(d) for
            L2-normalised ones.
        eps: keeps the square root differentiable at zero variance.

    Returns:
        [G].
    """
    deviation = torch.sqrt(x.var(dim=-2) + eps)  # [G, d]
    return torch.relu(-deviation + gamma).mean(dim=-1)  # gamma - deviation would specialise a compiled graph
