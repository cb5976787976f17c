"""Batch norm (Ioffe and Szegedy 2015) with what follows it in a residual network: a sum and a ReLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.reference.retrieve import in_forward_mode


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    add: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """max(0, (x − mean) / sqrt(variance + eps) · weight + bias + add); the arguments of torch's own up to `eps`.

    Args:
        x: [B, C, …].
        running_mean: [C], updated in place where `training`.
        running_var: [C], likewise.
        weight: [C] or None for 1.
        bias: [C] or None for 0.
        training: normalise by the statistics of the batch instead of the running ones.
        momentum: of the running statistics.
        eps: added to the variance.
        add: [B, C, …].
        relu: whether negative results become 0.

    Returns:
        [B, C, …].
    """
    if training and in_forward_mode():
        # The second derivative of torch's own is wrong there: its jvp takes mean and variance for constants (2.14).
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        count = x.numel() / x.shape[1]
        update_running(running_mean, mean, momentum)
        update_running(running_var, variance * (count / (count - 1)), momentum)
        normalised = normalised_by(x, mean, variance, weight, bias, eps)
    else:
        normalised = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    total = normalised if add is None else normalised + add
    return F.relu(total, inplace=True) if relu else total


def joint_moments(x: Tensor, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of each channel over the batches of several processes, and the number of values.

    Args:
        x: [B, C, …], those of this process.
        gather: [2C + 1] of every process, [W, 2C + 1]; differentiable.
    """
    values = x.transpose(0, 1).flatten(1)  # [C, R]
    count = values.shape[1]
    mean = values.sum(1) / max(count, 1)  # a process may be without values
    variance = (values - mean[:, None]).square().sum(1) / max(count, 1)
    return merged_moments(gather(torch.cat([mean, variance, mean.new_tensor([count])])))


def merged_moments(everyone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of a joint batch, and its number of values (Chan, Golub and LeVeque 1983).

    Args:
        everyone: [W, 2C + 1], mean, biased variance and number of values of each process.
    """
    means, variances = everyone[:, :-1].chunk(2, dim=1)  # [W, C] each
    count = everyone[:, -1].sum()
    weights = everyone[:, -1:] / count.clamp(min=1)  # all processes may be without values
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0), count


def normalised_by(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias of each channel: [B, C, …]."""
    shape = (-1, *[1] * (x.dim() - 2))
    result = (x - mean.view(shape)) * (variance + eps).rsqrt().view(shape)
    result = result if weight is None else result * weight.view(shape)
    return result if bias is None else result + bias.view(shape)


def update_running(running: Tensor | None, of_batch: Tensor, momentum: float | Tensor) -> None:
    """Move a running statistic towards that of a batch, in place."""
    if running is not None:
        momentum = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
        with torch.no_grad():
            running.lerp_(of_batch.to(running.dtype), momentum)
