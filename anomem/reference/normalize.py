"""Row normalisation: what stands between a feature vector and its inner products."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Normalize = Literal["none", "layer", "l2"]

LAYER_EPS = 1e-5
L2_EPS = 1e-12


def layer_normalize(x: Tensor) -> Tensor:
    """LayerNorm without affine: (x − mean) / sqrt(var + 1e-5) over the last axis (biased variance).

    Args:
        x: [..., d].

    Returns:
        [..., d].
    """
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_EPS)


def l2_normalize(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last axis; a zero row stays zero and passes no gradient.

    Args:
        x: [..., d].

    Returns:
        [..., d].
    """
    length = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    # The norm has no derivative at zero. A where on both sides of it keeps a zero row's gradient at zero, in the
    # second derivative too.
    nonzero = (length > L2_EPS) | length.isnan()
    safe = torch.where(nonzero, x, torch.ones_like(x))
    unit = safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True)
    return torch.where(nonzero, unit, torch.zeros_like(unit))


def normalize_rows(x: Tensor, normalize: Normalize) -> Tensor:
    """`norm(x)` of Eq. (1): LayerNorm without affine, unit length, or x itself.

    Args:
        x: [..., d].
        normalize: "layer", "l2" or "none".

    Returns:
        [..., d].
    """
    if normalize == "layer":
        return layer_normalize(x)
    if normalize == "l2":
        return l2_normalize(x)
    return x
