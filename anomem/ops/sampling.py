"""Gather of sampled positions and the variance hinge: the memory-bound operators of the native library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomem import reference
from anomem.ops import library
from anomem.ops.library import accumulator, define, empty


def _gather_fake(map: Tensor, positions: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    batch, channels = map.shape[:2]
    count, dtype = positions.shape[-1], accumulator(map)
    inv_norm = empty(map, count, batch, dtype=dtype) if normalize else empty(map, 0, dtype=dtype)
    return empty(map, count, batch, channels), inv_norm


def _gather_backward_fake(
    dout: Tensor,
    out: Tensor,
    inv_norm: Tensor,
    positions: Tensor,
    map_shape: list[int],
    channels_last: bool,
    normalize: bool,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(map_shape, dtype=dout.dtype, device=dout.device, memory_format=memory_format)


def _variance_fake(x: Tensor, gamma: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    groups, _, features = x.shape
    dtype = accumulator(x)
    return (
        empty(x, groups, dtype=dtype),
        empty(x, groups, features, dtype=dtype),
        empty(x, groups, features, dtype=dtype),
    )


def _variance_backward_fake(dloss: Tensor, x: Tensor, mean: Tensor, std: Tensor, gamma: float) -> Tensor:
    return empty(x, *x.shape)


define(
    "native_gather_fwd",
    "(Tensor map, Tensor positions, bool normalize) -> (Tensor out, Tensor inv_norm)",
    _gather_fake,
)
define(
    "native_gather_bwd",
    "(Tensor dout, Tensor out, Tensor inv_norm, Tensor positions, SymInt[] map_shape, bool channels_last, "
    "bool normalize) -> Tensor",
    _gather_backward_fake,
)
define(
    "native_variance_fwd",
    "(Tensor x, float gamma, float eps) -> (Tensor loss, Tensor mean, Tensor std)",
    _variance_fake,
    scheduled=("gamma", "eps"),
)
define(
    "native_variance_bwd",
    "(Tensor dloss, Tensor x, Tensor mean, Tensor std, float gamma) -> Tensor",
    _variance_backward_fake,
    scheduled=("gamma",),
)


def gather_positions(feature_map: Tensor, positions: Tensor, normalize: bool) -> Tensor:
    """Native gather: [B, C, H, W] and [n] or [B, n] int64 -> [n, B, C]."""
    out: Tensor = library.apply(_Gather, feature_map, positions, normalize)[0]
    return out


def variance_hinge(x: Tensor, gamma: float | Tensor, eps: float | Tensor) -> Tensor:
    """Native variance hinge: [G, B, d] contiguous -> [G] in the accumulation dtype; gamma and eps may be 0-dim."""
    loss: Tensor = library.apply(_Variance, x, gamma, eps)[0]
    return loss


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(feature_map: Tensor, positions: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        out, inv_norm = torch.ops.anomem.native_gather_fwd(feature_map, positions, normalize)
        return out, inv_norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        feature_map, positions, ctx.normalize = inputs
        out, inv_norm = output
        ctx.mark_non_differentiable(inv_norm)
        ctx.set_materialize_grads(False)
        ctx.map_shape = feature_map.shape
        ctx.channels_last = (
            feature_map.is_contiguous(memory_format=torch.channels_last) and not feature_map.is_contiguous()
        )
        # Without normalisation the gradient needs nothing but the positions; the output is saved only with it.
        # A double backward needs the map again, which its producer keeps alive anyway.
        kept = (feature_map, out) if ctx.normalize else (None, None)
        ctx.save_for_backward(*kept, positions, inv_norm)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return None, None, None
        feature_map, *saved = ctx.saved_tensors
        out, positions, inv_norm = library.contiguous(saved)
        if library.wants_graph():

            def composite(feature_map: Tensor) -> Tensor:
                return reference.gather_positions(feature_map, positions, normalize=ctx.normalize)

            # Without normalisation the gather is linear, so any map will do.
            inputs = (dout.new_zeros(ctx.map_shape) if feature_map is None else feature_map,)
            (gradient,) = library.differentiable_gradients(composite, inputs, (True,), (dout,))
            return gradient, None, None
        dout = dout.contiguous()
        dmap = torch.ops.anomem.native_gather_bwd(
            dout, dout if out is None else out, inv_norm, positions, ctx.map_shape, ctx.channels_last, ctx.normalize
        )
        return dmap, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return library.vmap(_Gather.apply, 0, info, in_dims, args)


class _Variance(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, gamma: float | Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        forward = library.overload(torch.ops.anomem.native_variance_fwd, gamma, eps)
        loss, mean, std = forward(x, gamma, eps)
        return loss, mean, std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.gamma, ctx.eps = inputs
        _, mean, std = output
        ctx.mark_non_differentiable(mean, std)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, std)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dloss is None:
            return None, None, None
        x, mean, std = library.contiguous(ctx.saved_tensors)
        if library.wants_graph():

            def composite(x: Tensor) -> Tensor:
                return reference.variance_hinge(x, ctx.gamma, ctx.eps)

            (gradient,) = library.differentiable_gradients(composite, (x,), (True,), (dloss,))
            return gradient, None, None
        backward = library.overload(torch.ops.anomem.native_variance_bwd, ctx.gamma)
        return backward(dloss.contiguous(), x, mean, std, ctx.gamma), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return library.vmap(_Variance.apply, 1, info, in_dims, args)
