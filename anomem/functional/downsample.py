"""The two convolutions of stride 2 of a residual block: one operator in place of two."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import autocast_inputs, is_channels_last
from anomem.rules import Impl
from anomem.validation import require, require_same_kind, require_tensor


def downsample(
    x: Tensor, weight: Tensor, shortcut: Tensor, *, impl: Impl = "auto", part: bool = False
) -> tuple[Tensor, Tensor]:
    """A 3×3 convolution of stride 2 and padding 1, and a 1×1 convolution of stride 2, of the same map.

    `(conv2d(x, weight, stride=2, padding=1), conv2d(x, shortcut, stride=2))` without biases: how a residual block
    begins that halves the resolution. The native kernel takes channels-last maps. It shortens the backward pass; "auto"
    runs plain PyTorch where no gradient is wanted.

    Args:
        x: [B, C, H, W].
        weight: [C', C, 3, 3].
        shortcut: [C'', C, 1, 1].
        impl: "auto", "reference" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, or no gradient is wanted, choose by "auto".

    Returns:
        [B, C', ⌈H/2⌉, ⌈W/2⌉] and [B, C'', ⌈H/2⌉, ⌈W/2⌉].

    Raises:
        ArgumentError: a wrong shape, dtype or device, or an implementation that cannot run here.

    Example:
        >>> x = torch.randn(8, 16, 7, 6).to(memory_format=torch.channels_last)
        >>> branch, straight = downsample(x, torch.randn(32, 16, 3, 3), torch.randn(24, 16, 1, 1))
        >>> branch.shape, straight.shape
        (torch.Size([8, 32, 4, 3]), torch.Size([8, 24, 4, 3]))
    """
    require_tensor(x, "x", (4,), "[B, C, H, W]")
    require(min(x.shape[1:]) > 0, "x", "[B, C, H, W] with C, H and W ≥ 1", x)
    _check_weight(weight, "weight", x, 3)
    _check_weight(shortcut, "shortcut", x, 1)
    x, weight, shortcut = autocast_inputs(x, weight, shortcut)
    require_same_kind(weight, "weight", x, "x")
    require_same_kind(shortcut, "shortcut", x, "x")
    if _implementation(x, weight, shortcut, impl, part) == "reference":
        return reference.downsample(x, weight, shortcut)
    from anomem.ops import downsample as operators

    return operators.downsample(x, weight, shortcut)


def _check_weight(weight: Tensor, argument: str, x: Tensor, side: int) -> None:
    channels = x.shape[1]
    require_tensor(weight, argument, (4,), f"[C', C, {side}, {side}]")
    right = weight.shape[0] > 0 and weight.shape[1:] == (channels, side, side)
    require(right, argument, lambda: f"[C', {channels}, {side}, {side}] with C' ≥ 1", weight)


def _implementation(x: Tensor, weight: Tensor, shortcut: Tensor, impl: Impl, part: bool) -> str:
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in (x, weight, shortcut))
    if (impl == "auto" or part) and not (wanted and is_channels_last(x)):
        return "reference"
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    return backends.choose(
        rules.problem_of("downsample", x, weight, shortcut, features=x.shape[1], rows=rows), impl, part=part
    )
