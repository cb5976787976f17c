"""Batch norm with what follows it: one operator in place of three, over one process's batch or over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem import backends, choice, reference, rules
from anomem.functional._inputs import is_channels_last
from anomem.functional.distributed import gather_together, group_of, of_everyone, processes, sum_over
from anomem.ops.library import accumulator, may_be_differentiated
from anomem.rules import Impl
from anomem.validation import require, require_same_kind, require_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from anomem.functional.distributed import Group


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    relu: bool = False,
    process_group: Group | None = None,
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """Batch norm, then an optional sum, then an optional ReLU; otherwise as `torch.nn.functional.batch_norm`.

    The native kernel takes channels-last maps, in training or without a gradient; with "auto" all else runs plain
    PyTorch. In a joint batch it takes all maps.

    Args:
        x: [B, C, …].
        running_mean: [C], updated in place where `training`; needed where not.
        running_var: [C], likewise; the unbiased variance.
        weight: [C], None for 1.
        bias: [C], None for 0.
        training: normalise by the statistics of the batch instead of the running ones.
        momentum: part of the batch in the new running statistics.
        eps: > 0, added to the variance.
        add: added to the result, shape and dtype of `x`.
        relu: max(0, ·) of the result.
        process_group: where `training`, normalise by the joint batch of these processes. Its gradient has no graph in
            the native kernel.
        impl: "auto", "reference" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        [B, C, …] in the dtype of `x`.

    Raises:
        ArgumentError: a wrong shape, dtype or device, a batch with one value per channel, no statistics, or an
            implementation that cannot run here.

    Example:
        >>> x = torch.randn(8, 16, 4, 4).to(memory_format=torch.channels_last)
        >>> batch_norm(x, training=True, relu=True).shape
        torch.Size([8, 16, 4, 4])
    """
    group = None if process_group is None else group_of(process_group)
    joint = training and process_group is not None and processes(group) > 1
    _check(x, running_mean, running_var, weight, bias, training, joint, add)
    differentiated = may_be_differentiated([x, weight, bias, add])
    chosen = _implementation(x, training, joint, differentiated, impl, part)
    if chosen == "reference":
        if joint:
            given = Normed(x, running_mean, running_var, weight, bias, momentum, eps)
            return _joint(given, add, relu, group)
        return reference.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps, add=add, relu=relu
        )
    from anomem.ops import batch_norm as operators

    wide = accumulator(x)
    weight, bias = (None if given is None else given.to(wide).contiguous() for given in (weight, bias))
    feature_map, summand = _as_map(x), None if add is None else _as_map(add)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        statistics = running_mean.to(wide), running_var.to(wide)
        return operators.apply(feature_map, *statistics, weight, bias, summand, eps, relu).view_as(x)
    others = JointBatch(group) if joint else None
    out, mean, variance, count = operators.batch_norm(feature_map, weight, bias, summand, eps, relu, others)
    _require_several(count, x)
    _update_running(running_mean, running_var, mean, variance, count, momentum)
    # No view of the kernel's result: a ReLU in place on one makes autograd copy the gradient, in another layout.
    return out if x.dim() == 4 else out.view_as(x)


class Normed(NamedTuple):
    """A map in training, and what its batch norm needs."""

    x: Tensor
    """[B, C, …]."""
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float


def joint_sum(first: Normed, second: Normed, process_group: Group | None, impl: Impl = "auto") -> Tensor:
    """The sum of two batch norms by the joint batch of several processes, in one exchange each way.

    Args:
        first: a map and its batch norm.
        second: likewise; a map of the same shape and dtype.
        process_group: of at least two processes.
        impl: a preference; see `anomem.backends`.

    Returns:
        [B, C, …] in the dtype of the maps.

    Raises:
        ArgumentError: as `batch_norm`.
    """
    group, x = group_of(process_group), first.x
    _check(x, *first[1:5], True, True, second.x)
    _check(second.x, *second[1:5], True, True, None)
    if _implementation(x, True, True, may_be_differentiated([x, second.x]), impl, True) == "reference":
        summand = _joint(second, None, False, group)
        return _joint(first, summand, False, group)
    from anomem.ops import batch_norm as operators

    wide = accumulator(x)
    weights, biases = (
        [None if given is None else given.to(wide).contiguous() for given in pair]
        for pair in ((first.weight, second.weight), (first.bias, second.bias))
    )
    maps = _as_map(x), _as_map(second.x)
    out, mean, variance, count = operators.sum_of_two(maps, weights, biases, (first.eps, second.eps), JointBatch(group))
    _require_several(count, x)
    # One batch norm may be both.
    for i, one in ((1, second), (0, first)):
        _update_running(one.running_mean, one.running_var, mean[i], variance[i], count, one.momentum)
    return out if x.dim() == 4 else out.view_as(x)


def _update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: int,
    momentum: float,
) -> None:
    if count:
        reference.update_running(running_mean, mean, momentum)
        reference.update_running(running_var, variance * (count / (count - 1)), momentum)


def _implementation(x: Tensor, training: bool, joint: bool, differentiated: bool, impl: Impl, part: bool) -> str:
    if not joint and (impl == "auto" or part) and not is_channels_last(x):
        return "reference"
    rows = x.numel() // x.shape[1]
    problem = rules.problem_of("batch_norm", x, features=x.shape[1], rows=rows)
    if joint and (impl == "auto" or (part and impl == "triton")):
        # Not by the share's size or layout: processes that chose differently would mix up each other's messages.
        traced = torch.compiler.is_compiling()
        return "reference" if traced or choice.obstacle_of_auto(problem, "native") else "native"
    chosen = backends.choose(problem, impl, part=part)
    if (rows == 0 and not joint) or (not training and differentiated):
        return "reference"
    return chosen


def _as_map(x: Tensor) -> Tensor:
    """[B, C, …] as [B, C, H, W]."""
    return x if x.dim() == 4 else x.flatten(2)[..., None] if x.dim() > 2 else x[..., None, None]


class JointBatch:
    """What the processes of a group exchange for a batch norm: moments forward, two sums of gradients backward."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def moments(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance [C] of the joint batch, from those of this process, and its number of values."""
        mine = torch.cat([mean, variance, mean.new_tensor([count])])
        joint, spread, total = reference.merged_moments(of_everyone(mine, self.group))
        return joint, spread, int(total)

    def sums(self, *mine: Tensor) -> tuple[Tensor, ...]:
        """The sums over the processes, in one message."""
        return sum_over(torch.stack(mine), self.group).unbind()


def _joint(given: Normed, add: Tensor | None, relu: bool, group: ProcessGroup | None) -> Tensor:
    """The batch norm of the joint batch in plain PyTorch."""
    x, running_mean, running_var, weight, bias, momentum, eps = given
    wide = x.to(accumulator(x))
    mean, variance, count = reference.joint_moments(wide, lambda mine: gather_together([mine], group)[0])
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
        _require_several(int(count), x)
    part = momentum * (count > 0).to(count.dtype)  # of a bool it would be in float32
    reference.update_running(running_mean, mean.detach(), part)
    reference.update_running(running_var, variance.detach() * (count / (count - 1)), part)
    normalised = reference.normalised_by(wide, mean, variance, weight, bias, eps)
    total = normalised if add is None else normalised + add
    return (F.relu(total) if relu else total).to(x.dtype)


def _require_several(count: int, x: Tensor) -> None:
    """Refuse a batch, or a joint one, of one value per channel: it has no variance."""
    require(count != 1, "x", "more than one value per channel in training", x)


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    joint: bool,
    add: Tensor | None,
) -> None:
    require_tensor(x, "x", (), "[B, C, …]")
    require(x.dim() >= 2 and x.shape[1] > 0, "x", "[B, C, …] with C ≥ 1", x)
    channels = x.shape[1]
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, given in named.items():
        if given is not None:
            right = isinstance(given, Tensor) and given.shape == (channels,)
            require(right, name, lambda: f"[{channels}], a number for each channel of `x`", given)
            require(given.device == x.device, name, lambda: f"a tensor on {x.device}", given.device)
    for name in ("running_mean", "running_var"):
        require(training or named[name] is not None, name, "running statistics where `training` is False", "None")
    if training and not joint and x.numel():
        _require_several(x.numel() // channels, x)
    if add is not None:
        require_same_kind(add, "add", x, "x")
        require(add.shape == x.shape, "add", lambda: f"the shape of `x`, {list(x.shape)}", add)
