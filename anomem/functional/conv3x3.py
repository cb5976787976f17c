"""The 3×3 convolution of stride 1, with fewer multiplications than a direct one."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import autocast_inputs, is_channels_last
from anomem.rules import Impl
from anomem.validation import require, require_same_kind, require_tensor


def conv3x3(x: Tensor, weight: Tensor, *, impl: Impl = "auto", part: bool = False) -> Tensor:
    """A 3×3 convolution of stride 1 and padding 1, without bias: `conv2d(x, weight, padding=1)`.

    The native kernel takes channels-last maps and multiplies 16 times where a direct convolution does 36 times
    (Winograd's F(2×2, 3×3); Lavin and Gray 2016), in both passes. In bfloat16 it makes the gradients alone: it rounds
    transformed maps and weights once more, and the root mean square of its error on random maps is under four times a
    direct convolution's. A NaN, an infinity or a value beyond a quarter of the largest number also reaches the other
    pixels of the 2×2 tiles that read it.

    On processors that multiply bfloat16 in tiles (AMX) it is a direct convolution in that type, in both passes; there a
    NaN or an infinity at the border of a map may reach a gradient through the zeros around it. "auto" takes the kernel
    in bfloat16 where a gradient is wanted.

    Args:
        x: [B, C, H, W].
        weight: [C', C, 3, 3].
        impl: "auto", "reference" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        [B, C', H, W].

    Raises:
        ArgumentError: a wrong shape, dtype or device, or an implementation that cannot run here.

    Example:
        >>> x = torch.randn(8, 32, 7, 6).to(memory_format=torch.channels_last)
        >>> conv3x3(x, torch.randn(64, 32, 3, 3)).shape
        torch.Size([8, 64, 7, 6])
    """
    require_tensor(x, "x", (4,), "[B, C, H, W]")
    require(min(x.shape[1:]) > 0, "x", "[B, C, H, W] with C, H and W ≥ 1", x)
    channels = x.shape[1]
    require_tensor(weight, "weight", (4,), "[C', C, 3, 3]")
    right = weight.shape[0] > 0 and weight.shape[1:] == (channels, 3, 3)
    require(right, "weight", lambda: f"[C', {channels}, 3, 3] with C' ≥ 1", weight)
    x, weight = autocast_inputs(x, weight)
    require_same_kind(weight, "weight", x, "x")
    if _implementation(x, weight, impl, part) == "reference":
        return reference.conv3x3(x, weight)
    from anomem.ops import conv3x3 as operators

    return operators.conv3x3(x, weight)


def _implementation(x: Tensor, weight: Tensor, impl: Impl, part: bool) -> str:
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    images, channels, height, width = x.shape
    # In bfloat16 the kernel is chosen for its gradients. In a map of one row or column half of its tiles is zeros.
    runs = is_channels_last(x) and min(height, width) > 1 and (wanted or x.dtype != torch.bfloat16)
    if (impl == "auto" or part) and not runs:
        return "reference"
    of_image = height * width
    columns = weight.shape[0]
    problem = rules.problem_of("conv3x3", x, weight, features=channels, rows=of_image, columns=columns, groups=images)
    return backends.choose(problem, impl, part=part)
