"""The encoder as the processes of a training share it: one replica each (DDP), or shards of one (`fully_shard`).

Batch norm normalises by the statistics of the whole batch in either, or by those of each process's share. The
prototypes and the projections are small and replicated: their gradients are averaged in one message. Without other
processes the network is the model itself.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anomem.models import AnoMem
from anomem.nn import BatchNorm2d
from anomem.nn.batch_norm import normalised
from anomem.train.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from anomem.train.config import BatchNormOver


class Network:
    """Calls the encoder, and keeps the replicas of the processes the same.

    Args:
        model: its memories and projections are trained in place; its encoder too where there is one process. With
            several, `gather` brings the trained encoder back.
        ranks: the processes.
        shard: `fully_shard` in place of `DistributedDataParallel`.
        compile: of one process: passes with gradients run compiled.
        batch_norm: whose statistics batch norm normalises by: those of the "job" or of each "process".

    Example:
        >>> network = Network(model, Ranks.current())
        >>> maps = network(views)  # as model(views)
    """

    def __init__(
        self,
        model: AnoMem,
        ranks: Ranks,
        shard: bool = False,
        compile: bool = False,
        batch_norm: BatchNormOver = "job",
    ) -> None:
        self.model, self.ranks = model, ranks
        self.encoder: nn.Module = model.encoder
        self.call: Any = model.encoder
        self.replicated = [p for part in (model.projections, model.memories) for p in part.parameters()]
        # Not in place: other passes of the model would each be compiled again.
        self.compiled: Any = torch.compile(model) if compile else None
        if ranks.count == 1:
            return
        self.encoder = copy.deepcopy(model.encoder)
        self.joint = batch_norm == "job"
        if self.joint:
            self.encoder = with_joint_batch_norm(self.encoder)
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
        return self.call(self.model.standardized(views))  # type: ignore[no-any-return]

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
        self.ranks.average([p.grad for p in self.replicated if p.grad is not None])

    def gather(self) -> None:
        """Copy the trained encoder into the model; all processes call it."""
        if self.encoder is not self.model.encoder:
            own = self.model.encoder.state_dict()
            for name, value in self.encoder.state_dict().items():
                own[name].copy_(whole(value))
            if not self.joint:
                # A running average is linear: the mean over the processes moves by the mean of their statistics.
                self.ranks.average([b for b in self.model.encoder.buffers() if b.is_floating_point()])

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
    return replace_batch_norms(module, synchronised if next(module.parameters()).is_cuda else JointBatchNorm)


def replace_batch_norms(module: nn.Module, by: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """The module with others in the place of its batch norms, within it."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm | JointBatchNorm):
                setattr(part, name, by(child))
    return module


class JointBatchNorm(_BatchNorm):
    """A batch norm over the joint batch of all processes, on CPUs; parameters and buffers keep their names.

        layer = JointBatchNorm(nn.BatchNorm2d(16))
        layer(x)  # as the batch norm of the rows of all processes

    Args:
        norm: whose parameters, buffers and options are taken over.

    Shape:
        [B, C, …] -> [B, C, …]; what is added has the same.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.relu, self.impl = (norm.relu, norm.impl) if isinstance(norm, BatchNorm2d) else (False, "auto")
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.train(norm.training)

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        """Normalised by the joint batch in training mode, by the running statistics else."""
        return normalised(self, input, add, self.relu, self.impl, dist.group.WORLD)


class _SynchronisedWithReLU(nn.SyncBatchNorm):
    """torch's synchronised batch norm with the sum and the ReLU of `anomem.nn.BatchNorm2d`."""

    relu = False

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        total = super().forward(input)
        total = total if add is None else total + add
        return F.relu(total, inplace=True) if self.relu else total


def synchronised(norm: _BatchNorm) -> nn.Module:
    """torch's batch norm over several processes, with what follows ours."""
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    if isinstance(norm, BatchNorm2d):
        converted.__class__ = _SynchronisedWithReLU
        converted.relu = norm.relu  # type: ignore[assignment]
    return converted


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Around a second pass over the same views: batch norms normalise by the batch, and their running averages stay."""
    tracking = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
