"""The encoder as the processes of a training share it: one replica each (DDP), or shards of one (`fully_shard`).

Batch norm normalises by the statistics of the whole batch in either. The prototypes and the projections are small and
replicated: their gradients are averaged in one message. Without other processes the network is the model itself.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomem.functional.distributed import sum_over
from anomem.models import AnoMem
from anomem.train.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Network:
    """Calls the encoder, and keeps the replicas of the processes the same.

    Args:
        model: its memories and projections are trained in place; its encoder too where there is one process. With
            several, `gather` brings the trained encoder back.
        ranks: the processes.
        shard: `fully_shard` in place of `DistributedDataParallel`.
        compile: of one process: passes with gradients run compiled.

    Example:
        >>> network = Network(model, Ranks.current())
        >>> maps = network(views)  # as model(views)
    """

    def __init__(self, model: AnoMem, ranks: Ranks, shard: bool = False, compile: bool = False) -> None:
        self.model, self.ranks = model, ranks
        self.encoder: nn.Module = model.encoder
        self.call: Any = model.encoder
        self.replicated = [p for part in (model.projections, model.memories) for p in part.parameters()]
        # Not in place: other passes of the model would each be compiled again.
        self.compiled: Any = torch.compile(model) if compile else None
        if ranks.count == 1:
            return
        self.encoder = with_joint_batch_norm(copy.deepcopy(model.encoder))
        trained = any(p.requires_grad for p in self.encoder.parameters())
        self.call = self.encoder
        if trained and shard:
            from torch.distributed.fsdp import fully_shard

            self.encoder.to(memory_format=torch.contiguous_format)  # of weights; it shards no others
            for part in self.encoder.modules():
                if isinstance(part, nn.ModuleDict):  # the stages of a chain, each gathered when it is its turn
                    for stage in part.values():
                        fully_shard(stage)
            fully_shard(self.encoder)  # type: ignore[arg-type]
        elif trained:
            replicas = nn.parallel.DistributedDataParallel
            # torch 2.14 renamed it, and warns about the name it had before.
            renamed = "forward_sync_buffers" in inspect.signature(replicas.__init__).parameters
            buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self.call = replicas(self.encoder, gradient_as_bucket_view=True, **buffers)  # type: ignore[arg-type]

    def __call__(self, views: Tensor) -> list[Tensor]:
        """S maps [2B, C_s, H_s, W_s] of views [2B, C, H, W] in [0, 1]."""
        if self.compiled is not None and torch.is_grad_enabled():
            return self.compiled(views)  # type: ignore[no-any-return]
        if self.ranks.count == 1:
            return self.model(views)  # type: ignore[no-any-return]
        return self.call((views - self.model.mean) / self.model.std)  # type: ignore[no-any-return]

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters and their names in the model."""
        encoder = [(f"encoder.{name}", p) for name, p in self.encoder.named_parameters()]
        others = [(name, p) for name, p in self.model.named_parameters() if not name.startswith("encoder.")]
        return encoder + others

    def more_to_come(self, more: bool) -> AbstractContextManager[Any]:
        """Around a backward pass: gradients are exchanged in the last one only."""
        quiet = more and isinstance(self.call, nn.parallel.DistributedDataParallel)
        return self.call.no_sync() if quiet else nullcontext()

    def reduce(self) -> None:
        """Average the gradients of prototypes and projections over the processes."""
        self.ranks.average_gradients(self.replicated)

    def gather(self) -> None:
        """Copy the trained encoder into the model; all processes call it."""
        if self.encoder is not self.model.encoder:
            own = self.model.encoder.state_dict()
            for name, value in self.encoder.state_dict().items():
                own[name].copy_(whole(value))

    def scatter(self) -> None:
        """Copy the model's encoder into the trained one; all processes call it."""
        if self.encoder is not self.model.encoder:
            own = self.model.encoder.state_dict()
            for name, value in self.encoder.state_dict().items():
                value.copy_(sharded_as(own[name], value))


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, complete in every process."""
    return value.full_tensor() if is_shard(value) else value


def sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """A complete tensor as this process's shard of it, where `like` is sharded."""
    if not is_shard(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one that `fully_shard` has made. Where their class was never imported there are none.

    Its import brings sympy and takes a fifth of the time in which a command starts.
    """
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def with_joint_batch_norm(module: nn.Module) -> nn.Module:
    """The module with batch norms that normalise by the joint batch of all processes, in place where it can be.

    torch's `SyncBatchNorm` runs on GPUs only.
    """
    if next(module.parameters()).is_cuda:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    for part in module.modules():
        for name, child in part.named_children():
            if isinstance(child, _BatchNorm):
                setattr(part, name, JointBatchNorm(child))
    return module


class JointBatchNorm(nn.Module):
    """A batch norm over the joint batch of all processes, on CPUs; parameters and buffers keep their names.

        layer = JointBatchNorm(nn.BatchNorm2d(16))
        layer(x)  # as the batch norm of the rows of all processes

    Args:
        norm: whose parameters, buffers and options are taken over.

    Shape:
        [B, C, …] -> [B, C, …].
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum, self.track_running_stats = norm.eps, norm.momentum, norm.track_running_stats
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised by the joint batch in training mode, by the running statistics else."""
        weight, bias, running_mean, running_var = self.weight, self.bias, self.running_mean, self.running_var
        if not self.training and running_mean is not None:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, self.eps)
        if weight is None:
            weight, bias = (value.expand(x.shape[1]) for value in x.new_tensor([1.0, 0.0], dtype=torch.float32))
        mean, variance, count = _joint_statistics(x.detach())
        if self.training and self.track_running_stats and running_mean is not None and running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                part = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                running_mean.lerp_(mean, part)
                running_var.lerp_(variance * (count / (count - 1)), part)
        normalised: Tensor = _Normalise.apply(x, weight, bias, mean, variance, count, self.eps)  # type: ignore[no-untyped-call]
        return normalised


@torch.no_grad()
def _joint_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all processes [C], and the number of values."""
    # By batch norm's own passes: var_mean would copy a map to float32 and stride through it. The statistics have the
    # dtype of the running ones, which are dropped here.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dropped = (torch.zeros(x.shape[1], dtype=dtype) for _ in range(2))
    mean, variance = torch.ops.aten.batch_norm_update_stats(x, *dropped, 0.0)
    count = x.numel() / x.shape[1]
    mine = torch.cat([mean, variance, mean.new_tensor([count])])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    found = torch.stack(everyone)
    means, variances = found[:, :-1].chunk(2, dim=1)  # [W, C] each
    weights = found[:, -1:] / found[:, -1].sum()
    joint = (weights * means).sum(0)
    return joint, (weights * (variances + (means - joint).square())).sum(0), found[:, -1].sum()


class _Normalise(torch.autograd.Function):
    """(x − mean) / sqrt(variance + eps) · weight + bias, whose mean and variance depend on the x of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # In eval mode torch's own backward gives upstream · weight / std and both sums in one pass.
        direct, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            upstream, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        along, constant = sum_over(torch.stack([d_weight, d_bias])) / count
        inverse = (variance + ctx.eps).rsqrt()
        slope = weight * inverse.square() * along
        offset = weight * inverse * constant - slope * mean
        # slope · x + offset in one pass.
        one = torch.ones_like(mean)
        correction = F.batch_norm(x, torch.zeros_like(mean), one, slope, offset, False, 0.0, 0.0)
        return direct.sub_(correction), d_weight, d_bias, None, None, None, None


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Around a second pass over the same views: batch norms normalise by the batch, and their running averages stay."""
    tracking = [m for m in module.modules() if isinstance(m, _BatchNorm | JointBatchNorm) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
