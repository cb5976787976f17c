"""Batch norm with an optional sum and ReLU behind it, on channels-last maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from anomem import reference
from anomem.ops import library
from anomem.ops.library import accumulator, channels_last, define, empty

ONCE = "a batch norm over several processes is differentiated once; take impl='reference'"


def _statistics_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty(x, x.shape[1], dtype=accumulator(x)), empty(x, x.shape[1], dtype=accumulator(x))


def _apply_fake(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _sums_fake(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    return _statistics_fake(x)


def _gradient_fake(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    constant: Tensor,
    along: Tensor,
    count: int,
    eps: float,
    relu: bool,
    add: bool,
) -> tuple[Tensor, Tensor]:
    map_like = torch.empty_like(x, memory_format=torch.channels_last)
    return map_like, torch.empty_like(map_like) if add else empty(x, 0)


define("native_batch_norm_statistics", "(Tensor x) -> (Tensor mean, Tensor variance)", _statistics_fake)
define(
    "native_batch_norm_apply",
    "(Tensor x, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, Tensor? add, float eps, bool relu) "
    "-> Tensor",
    _apply_fake,
)
define(
    "native_batch_norm_sums",
    "(Tensor dout, Tensor x, Tensor? out, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, float eps, "
    "bool relu) -> (Tensor constant, Tensor along)",
    _sums_fake,
)
define(
    "native_batch_norm_gradient",
    "(Tensor dout, Tensor x, Tensor? out, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, "
    "Tensor constant, Tensor along, SymInt count, float eps, bool relu, bool add) -> (Tensor dx, Tensor dadd)",
    _gradient_fake,
)


class Joint(Protocol):
    """How the batch of this process is joined with those of others."""

    def moments(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance [C] of all, and their number of values per channel."""

    def sums(self, *mine: Tensor) -> tuple[Tensor, ...]:
        """Sums over all."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    eps: float,
    relu: bool,
    joint: Joint | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Batch norm by the statistics of the batch.

    Args:
        x: [B, C, H, W], empty in a joint batch alone; copied where it is not channels-last.
        weight: [C] contiguous in the accumulation dtype, or None for 1.
        bias: [C] likewise, or None for 0.
        add: as `x`, or None for 0.
        eps: added to the variance.
        relu: whether negative results become 0.
        joint: other processes whose batches count too.

    Returns:
        [B, C, H, W], mean and biased variance [C], and the number of values that they are of.
    """
    out, mean, variance, count = library.apply(_BatchNorm, x, weight, bias, add, eps, relu, joint)
    return out, mean, variance, count


def apply(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """Batch norm by given statistics [C], without a gradient; the other arguments are those of `batch_norm`."""
    result: Tensor = torch.ops.anomem.native_batch_norm_apply(
        channels_last(x), mean, variance, weight, bias, channels_last(add), eps, relu
    )
    return result


def sum_of_two(
    maps: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    eps: Sequence[float],
    joint: Joint,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The sum of the batch norms of two maps in a joint batch, in one exchange each way; once differentiable.

    Args:
        maps: [B, C, H, W] twice.
        weights: of each as in `batch_norm`.
        biases: likewise.
        eps: likewise.
        joint: other processes.

    Returns:
        [B, C, H, W], means and biased variances [2, C], and the number of values that they are of.
    """
    out, mean, variance, count = library.apply(_SumOfTwo, *maps, *weights, *biases, eps, joint)
    return out, mean, variance, count


def _moments(x: Tensor, may_be_empty: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of a channels-last map; zeros where it is without values."""
    if may_be_empty and x.numel() == 0:
        return (x.new_zeros(x.shape[1], dtype=accumulator(x)),) * 2
    mean, variance = torch.ops.anomem.native_batch_norm_statistics(x)
    return mean, variance


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        add: Tensor | None,
        eps: float,
        relu: bool,
        joint: Joint | None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        x, add = channels_last(x), channels_last(add)
        count = x.numel() // x.shape[1]
        mean, variance = _moments(x, joint is not None)
        if joint is not None:
            mean, variance, count = joint.moments(mean, variance, count)
        return apply(x, mean, variance, weight, bias, add, eps, relu), mean, variance, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, int]) -> None:
        x, weight, bias, add, ctx.eps, ctx.relu, ctx.joint = inputs
        out, mean, variance, ctx.count = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        # The ReLU's gate can be made again from x, but for what was added.
        kept = out if ctx.relu and add is not None else None
        ctx.save_for_backward(x, weight, bias, add if kept is not None else None, kept, mean, variance)
        ctx.added = add is not None

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return (None,) * 7
        x, weight, bias, add, out, mean, variance = ctx.saved_tensors
        if library.wants_graph() or library.is_batched(dout):
            return (*_with_graph(ctx, x, weight, bias, add, dout), None, None, None)
        x, out, dout = (channels_last(one) for one in (x, out, dout))
        affine = (mean, variance, weight, bias)
        operators = torch.ops.anomem
        constant, along = operators.native_batch_norm_sums(dout, x, out, *affine, ctx.eps, ctx.relu)
        of_all = (constant, along) if ctx.joint is None else ctx.joint.sums(constant, along)
        gated = ctx.relu and ctx.needs_input_grad[3]
        dx = dadd = None
        if ctx.needs_input_grad[0] or gated:
            dx, dadd = operators.native_batch_norm_gradient(
                dout, x, out, *affine, *of_all, ctx.count, ctx.eps, ctx.relu, gated
            )
        if ctx.added and not gated:
            dadd = dout
        numbers = along if weight is not None else None, constant if bias is not None else None
        return dx, *numbers, dadd if ctx.added else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        if args[-1] is not None:
            raise RuntimeError("a batch norm over several processes has no vmap")
        counts: list[int] = []

        def tensors(*given: Any) -> tuple[Tensor, ...]:
            *found, count = _BatchNorm.apply(*given)  # type: ignore[no-untyped-call]
            counts.append(count)
            return tuple(found)

        found, dims = library.vmap(tensors, 0, info, in_dims, args)
        return (*found, counts[0]), (*dims, None)


class _SumOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor,
        x_weight: Tensor | None,
        y_weight: Tensor | None,
        x_bias: Tensor | None,
        y_bias: Tensor | None,
        eps: Sequence[float],
        joint: Joint,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        x, y = channels_last(x), channels_last(y)
        means, variances = zip(_moments(x, True), _moments(y, True), strict=True)
        mean, variance, count = joint.moments(torch.cat(means), torch.cat(variances), x.numel() // x.shape[1])
        mean, variance = mean.view(2, -1), variance.view(2, -1)
        summand = apply(y, mean[1], variance[1], y_weight, y_bias, None, eps[1], False)
        return apply(x, mean[0], variance[0], x_weight, x_bias, summand, eps[0], False), mean, variance, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, int]) -> None:
        x, y, x_weight, y_weight, x_bias, y_bias, ctx.eps, ctx.joint = inputs
        _, mean, variance, ctx.count = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, x_weight, y_weight, x_bias, y_bias, mean, variance)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return (None,) * 8
        if library.wants_graph():
            raise RuntimeError(ONCE)
        x, y, *affine, mean, variance = ctx.saved_tensors
        dout = channels_last(dout)
        x, y = channels_last(x), channels_last(y)
        two = [(one, None, mean[i], variance[i], affine[i], affine[2 + i]) for i, one in enumerate((x, y))]
        operators = torch.ops.anomem
        sums = [operators.native_batch_norm_sums(dout, *one, ctx.eps[i], False) for i, one in enumerate(two)]
        of_all = ctx.joint.sums(*sums[0], *sums[1])
        gradients: list[Tensor | None] = [None] * 8
        for i, (one, (constant, along)) in enumerate(zip(two, sums, strict=True)):
            if ctx.needs_input_grad[i]:
                gradients[i], _ = operators.native_batch_norm_gradient(
                    dout, *one, *of_all[2 * i : 2 * i + 2], ctx.count, ctx.eps[i], False, False
                )
            gradients[2 + i] = None if affine[i] is None else along
            gradients[4 + i] = None if affine[2 + i] is None else constant
        return tuple(gradients)


def _with_graph(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, add: Tensor | None, dout: Tensor
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and add that can be differentiated again."""
    if ctx.joint is not None:
        raise RuntimeError(ONCE)

    def composite(x: Tensor, weight: Tensor | None, bias: Tensor | None, add: Tensor | None) -> Tensor:
        return reference.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps, add=add, relu=ctx.relu)

    if add is None and ctx.added:  # without a ReLU the sum is linear, so that any summand will do
        add = torch.zeros_like(x)
    return library.differentiable_gradients(composite, (x, weight, bias, add), ctx.needs_input_grad[:4], (dout,))
