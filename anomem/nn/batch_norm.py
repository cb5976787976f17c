"""Batch norm of maps with what follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import _has_any_global_hook

from anomem.functional.batch_norm import Normed, batch_norm, joint_sum
from anomem.functional.distributed import processes
from anomem.rules import IMPLEMENTATIONS, Impl
from anomem.validation import require_choice

if TYPE_CHECKING:
    from anomem.functional.distributed import Group


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, its ReLU and the sum of a residual branch in one operator.

    Parameters, buffers and their names are those of torch's; state dicts fit both. On CPUs the kernel takes
    channels-last maps.

    Args:
        num_features: C.
        eps: > 0, added to the variance.
        momentum: part of the batch in the new running statistics; None for the mean over all batches.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics.
        relu: max(0, ·) of the result.
        impl: "auto", "reference", "triton" or "native", a preference; see `anomem.backends`.

    Shape:
        [B, C, H, W] -> [B, C, H, W]; what is added has the same.

    Raises:
        ArgumentError: an unknown implementation; in the call as `anomem.functional.batch_norm`.

    Example:
        >>> norm = BatchNorm2d(16, relu=True)
        >>> norm(torch.randn(8, 16, 4, 4).to(memory_format=torch.channels_last)).min()
        tensor(0., grad_fn=<MinBackward1>)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        relu: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        require_choice(impl, "impl", IMPLEMENTATIONS)
        self.relu, self.impl = relu, impl
        self.joint = False
        """Whether a training of several processes normalises by their joint batch."""

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        """The normalised map, plus `add`, through the ReLU where there is one."""
        self._check_input_dim(input)
        return normalised(self, input, add, self.relu, self.impl, dist.group.WORLD if self.joint else None)

    def extra_repr(self) -> str:
        """Arguments of the constructor."""
        described: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return described + (", relu=True" if self.relu else "")


class JointBatchNorm(_BatchNorm):
    """A batch norm over the joint batch of all processes, on CPUs; parameters and buffers keep their names.

        layer = JointBatchNorm(nn.BatchNorm2d(16))
        layer(x)  # as the batch norm of the rows of all processes

    Args:
        norm: whose parameters, buffers and options are taken over.
        joint: whether the batches of the processes are one; each has its own else.

    Shape:
        [B, C, …] -> [B, C, …]; what is added has the same.
    """

    def __init__(self, norm: _BatchNorm, joint: bool = True) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.joint = joint
        self.relu, self.impl = (norm.relu, norm.impl) if isinstance(norm, BatchNorm2d) else (False, "auto")
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.train(norm.training)

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        """Normalised by the joint batch in training mode, by the running statistics else."""
        return normalised(self, input, add, self.relu, self.impl, dist.group.WORLD if self.joint else None)


def sum_of_two(first: nn.Module, x: Tensor, second: nn.Module, y: Tensor) -> Tensor:
    """`first(x, second(y))` of two batch norms: their sum.

    In the joint batch of several processes both exchange their statistics in one message.

    Args:
        first: takes a summand, as `BatchNorm2d`.
        x: [B, C, H, W].
        second: any batch norm.
        y: the same shape.
    """
    if _exchanges(first) and _exchanges(second) and not second.relu and x.shape == y.shape and x.dtype == y.dtype:
        summand = _counted(second, y)  # first, as in `first(x, second(y))`: one batch norm may be both
        total = joint_sum(_counted(first, x), summand, dist.group.WORLD, first.impl)
        return F.relu(total, inplace=True) if first.relu else total
    summed: Tensor = first(x, second(y))
    return summed


def _exchanges(norm: nn.Module) -> TypeGuard[JointBatchNorm]:
    """Whether a batch norm takes the statistics of a joint batch, without hooks that would see its map."""
    joint = isinstance(norm, JointBatchNorm) and norm.joint and norm.training
    return joint and processes(None) > 1 and not has_hooks(norm)


def has_hooks(layer: nn.Module) -> bool:
    """Whether something looks at a layer's calls."""
    return _has_any_global_hook() or any(
        (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    )


def normalised(
    norm: _NormBase,
    x: Tensor,
    add: Tensor | None = None,
    relu: bool = False,
    impl: Impl = "auto",
    process_group: Group | None = None,
) -> Tensor:
    """What a batch norm's mode, parameters and running statistics make of a map; counts the batch in training mode.

    Args:
        norm: torch's or one of its subclasses.
        x: [B, C, …].
        add: added to the result.
        relu: max(0, ·) of the result.
        impl: a preference.
        process_group: of `anomem.functional.batch_norm`.
    """
    training = norm.training or norm.running_mean is None
    x, running_mean, running_var, weight, bias, momentum, eps = _counted(norm, x)
    return batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps,
        add=add, relu=relu, process_group=process_group, impl=impl, part=True,
    )  # fmt: skip


def _counted(norm: _NormBase, x: Tensor) -> Normed:
    """A map and the parameters and running statistics of its batch norm; counts the batch in training mode."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    training = norm.training or norm.running_mean is None
    running = (norm.running_mean, norm.running_var) if not training or norm.track_running_stats else (None, None)
    return Normed(x, *running, norm.weight, norm.bias, momentum, norm.eps)
