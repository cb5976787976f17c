"""The 3×3 and the 1×1 convolution of stride 2 of one channels-last map.

The 1×1 convolution reads every second pixel of every second row. It runs as a dense one on a sample of those, a quarter
of the map, and the gradient of the sample is added to that of the 3×3 convolution in place. Plain PyTorch writes a
gradient of the whole map, three quarters of it zeros, and adds two of those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomem import reference
from anomem.ops import library
from anomem.ops.library import channels_last, define


def _take_fake(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    shape = batch, channels, (height + 1) // 2, (width + 1) // 2
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _add_fake(map: Tensor, sampled: Tensor) -> None:
    return None


define("native_downsample_take", "(Tensor x) -> Tensor", _take_fake)
define("native_downsample_add", "(Tensor(a!) map, Tensor sampled) -> ()", _add_fake)


def downsample(x: Tensor, weight: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
    """Both convolutions.

    Args:
        x: [B, C, H, W], copied where it is not channels-last.
        weight: [C', C, 3, 3].
        shortcut: [C'', C, 1, 1].

    Returns:
        [B, C', ⌈H/2⌉, ⌈W/2⌉] and [B, C'', ⌈H/2⌉, ⌈W/2⌉].
    """
    branch, straight, _ = library.apply(_Downsample, x, weight, shortcut)
    return branch, straight


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = channels_last(x)
        sampled = torch.ops.anomem.native_downsample_take(x)
        return torch.conv2d(x, weight, None, 2, 1), torch.conv2d(sampled, shortcut), sampled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        sampled = output[2]
        ctx.mark_non_differentiable(sampled)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, sampled)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dbranch: Tensor | None, dstraight: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        x, weight, shortcut, sampled = ctx.saved_tensors
        if dbranch is None and dstraight is None:
            return None, None, None
        if library.wants_graph() or library.is_transformed():
            inputs, grads = (x, weight, shortcut), (dbranch, dstraight)
            return tuple(library.differentiable_gradients(reference.downsample, inputs, ctx.needs_input_grad, grads))
        of_x, of_weight, of_shortcut = ctx.needs_input_grad
        dx = dweight = dsampled = dshortcut = None
        if dbranch is not None:
            dx, dweight = _gradients(dbranch, channels_last(x), weight, 2, 1, of_x, of_weight)
        if dstraight is not None:
            dsampled, dshortcut = _gradients(dstraight, channels_last(sampled), shortcut, 1, 0, of_x, of_shortcut)
        if dsampled is not None:
            dx = torch.zeros_like(x, memory_format=torch.channels_last) if dx is None else channels_last(dx)
            torch.ops.anomem.native_downsample_add(dx, channels_last(dsampled))
        return dx, dweight, dshortcut

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        return library.vmap(_Downsample.apply, 1, info, in_dims, args)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of a convolution's input and weight, None where not wanted."""
    if not of_x and not of_weight:
        return None, None
    mask = of_x, of_weight, False
    pairs = [stride] * 2, [padding] * 2, [1, 1]
    dx, dweight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *pairs, False, [0, 0], 1, mask)
    return dx, dweight
