"""The 3×3 convolution of stride 1 between two maps of the same size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """A 3×3 convolution of stride 1 and padding 1, without bias.

    Args:
        x: [B, C, H, W].
        weight: [C', C, 3, 3].

    Returns:
        [B, C', H, W].
    """
    return F.conv2d(x, weight, padding=1)
