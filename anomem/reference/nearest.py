"""The nearest prototypes of features, and the greedy k-center of a set of features.

|x − m|² = |x|² − 2 (x·m − |m|²/2): the nearest prototype is the one whose bracket is largest. The brackets choose, and
the distance of what was chosen is the sum of squared differences, which loses no digits where x and m are close.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """The k nearest prototypes, the nearest first."""

    distance: Tensor
    """[..., N, k], squared Euclidean distances."""
    indices: Tensor
    """[..., N, k] int64, of the prototypes; of equal distances the lowest index first."""


def nearest(x: Tensor, prototypes: Tensor, k: int = 1) -> Nearest:
    """The k nearest prototypes of each row.

    Args:
        x: [..., N, d].
        prototypes: [M, d], or [L, M, d] for x [L, N, d] or [N, d].
        k: from 1 to M.

    Returns:
        `Nearest(distance, indices)`; a distance that is NaN counts as the largest.
    """
    key = prototypes.square().sum(dim=-1)[..., None, :] / 2 - x @ prototypes.mT  # [..., N, M]
    if k == 1:
        index = torch.where(key.isnan(), torch.inf, key).argmin(dim=-1, keepdim=True)  # the first of equals
    else:
        index = key.sort(dim=-1, stable=True).indices[..., :k].sort(dim=-1).values  # NaN is sorted last
    distance = squared_distances(x, prototypes, index)
    order = distance.sort(dim=-1, stable=True).indices
    return Nearest(distance.gather(-1, order), index.gather(-1, order))


def squared_distances(x: Tensor, prototypes: Tensor, index: Tensor) -> Tensor:
    """|x − m|² of chosen prototypes.

    Args:
        x: [..., N, d].
        prototypes: [M, d] or [L, M, d].
        index: [..., N, k].

    Returns:
        [..., N, k].
    """
    if prototypes.dim() == 2:
        chosen = prototypes[index]  # [..., N, k, d]
    else:
        bank = torch.arange(len(prototypes), device=index.device)[:, None, None]
        chosen = prototypes[bank, index]
    return (x[..., None, :] - chosen).square().sum(dim=-1)


def k_center(x: Tensor, count: int, first: int = 0) -> Tensor:
    """Greedy k-center (Gonzalez 1985): every next row is the one farthest from all rows chosen before it.

    Args:
        x: [N, d].
        count: of rows to choose, from 1 to N.
        first: the row to begin with.

    Returns:
        [count] int64, distinct; of equally far rows the lowest index.
    """
    distance = torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)
    chosen = [torch.full((), first, device=x.device)]
    for _ in range(count - 1):
        centre = x.index_select(0, chosen[-1][None])  # [1, d]
        # NaN is never farther than another row that is not chosen.
        squares = (x - centre).square().sum(dim=1).nan_to_num(nan=-0.5, posinf=torch.inf)
        distance = torch.minimum(distance, squares).index_fill(0, chosen[-1][None], -1.0)
        chosen.append(distance.argmax())
    return torch.stack(chosen)
