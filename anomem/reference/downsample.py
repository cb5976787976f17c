"""The two convolutions of stride 2 with which a residual block halves the resolution of its input (He et al. 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def downsample(x: Tensor, weight: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
    """A 3×3 convolution of stride 2 and padding 1, and a 1×1 convolution of stride 2, of the same map.

    Args:
        x: [B, C, H, W].
        weight: [C', C, 3, 3], the first layer of the branch.
        shortcut: [C'', C, 1, 1], the projection beside it.

    Returns:
        [B, C', ⌈H/2⌉, ⌈W/2⌉] and [B, C'', ⌈H/2⌉, ⌈W/2⌉].
    """
    return F.conv2d(x, weight, stride=2, padding=1), F.conv2d(x, shortcut, stride=2)
