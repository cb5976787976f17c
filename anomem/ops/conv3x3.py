"""The 3×3 convolution of stride 1 of one channels-last map, by Winograd's minimal filtering F(2×2, 3×3) or directly.

16 multiplications where a direct convolution has 36, in the forward pass and in both gradients (Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2016). The gradient of the map is a convolution too, of the upstream
gradient by the turned weight.

Processors that multiply bfloat16 in tiles (AMX) convolve it directly, in both passes. On others the forward pass in
bfloat16 is torch's, which is direct: only gradients bear the rounding of the transforms.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from anomem import reference
from anomem.ops import library, native
from anomem.ops.library import channels_last, define


def _convolve_fake(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    batch, _, height, width = x.shape
    shape = batch, weight.shape[1 if transposed else 0], height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _weight_fake(x: Tensor, grad: Tensor) -> Tensor:
    shape = grad.shape[1], x.shape[1], 3, 3
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


define("native_conv3x3", "(Tensor x, Tensor weight, bool transposed) -> Tensor", _convolve_fake)
define("native_conv3x3_direct", "(Tensor x) -> bool", lambda x: False)
define("native_conv3x3_weight", "(Tensor x, Tensor grad) -> Tensor", _weight_fake)


def makes_forward(dtype: torch.dtype) -> bool:
    """Whether the library makes the forward pass of such maps too: in bfloat16 where it convolves directly."""
    return dtype != torch.bfloat16 or _is_direct(torch._C._get_mkldnn_enabled())


# What the decorator torch.compiler.assume_constant_result sets, as in anomem/backends.py.
makes_forward._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _is_direct(mkldnn: bool) -> bool:
    """Whether bfloat16 is convolved directly, by products of the library that torch.backends.mkldnn switches off."""
    if not mkldnn or native.obstacle("cpu") is not None:
        return False
    return bool(torch.ops.anomem.native_conv3x3_direct(torch.empty(0, dtype=torch.bfloat16)))


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution.

    Args:
        x: [B, C, H, W], copied where it is not channels-last.
        weight: [C', C, 3, 3], copied where it is not channels-last.

    Returns:
        [B, C', H, W], channels-last.
    """
    result: Tensor = library.apply(_Conv3x3, x, weight)
    return result


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        x, weight = channels_last(x), channels_last(weight)
        if not makes_forward(x.dtype):  # features of rounded transforms lose a thousandth of AUROC on digits
            return torch.conv2d(x, weight, padding=1)
        y: Tensor = torch.ops.anomem.native_conv3x3(x, weight, False)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if library.wants_graph() or library.is_transformed() or library.is_batched(grad):
            needed, inputs = ctx.needs_input_grad, (x, weight)
            dx, dweight = library.differentiable_gradients(reference.conv3x3, inputs, needed, (grad,))
            return dx, dweight
        of_x, of_weight = ctx.needs_input_grad
        grad = channels_last(grad)  # [B, C', H, W]
        operators = torch.ops.anomem
        dx = operators.native_conv3x3(grad, channels_last(weight), True) if of_x else None
        dweight = operators.native_conv3x3_weight(channels_last(x), grad) if of_weight else None
        return dx, dweight

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        (outs,), (dim,) = library.vmap(lambda *given: (_Conv3x3.apply(*given),), 1, info, in_dims, args)
        return outs, dim
