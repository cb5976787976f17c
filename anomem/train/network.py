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
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from anomem.functional.batch_norm import batch_norm
from anomem.models import AnoMem
from anomem.nn import BatchNorm2d
from anomem.nn.batch_norm import JointBatchNorm, has_hooks
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
        replace_batch_norms(self.encoder, joined if self.joint else separate)
        trained = any(p.requires_grad for p in self.encoder.parameters())
        self.call = self.encoder
        if trained and shard:
            from torch.distributed.fsdp import fully_shard

            self.encoder.to(memory_format=torch.contiguous_format)  # of weights; it shards no others
            # It shards no numbers: each process keeps them. In the order of the encoder, which is the same in all.
            numbers = [p for p in self.encoder.parameters() if p.dim() == 0]
            for part in self.encoder.modules():
                if isinstance(part, nn.ModuleDict):  # the stages of a chain, each gathered when it is its turn
                    for stage in part.values():
                        fully_shard(stage, ignored_params=set(numbers))
            fully_shard(self.encoder, ignored_params=set(numbers))  # type: ignore[arg-type]
            self.replicated += numbers
        elif trained:
            blank = torch.zeros(1, len(model.mean), *model.encoder.image_size, device=model.device)
            replicas = nn.parallel.DistributedDataParallel
            # torch 2.14 renamed it, and warns about the name it had before.
            renamed = "forward_sync_buffers" in inspect.signature(replicas.__init__).parameters
            options = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            options["find_unused_parameters"] = has_unused_parameters(self.encoder, blank)
            self.call = replicas(self.encoder, gradient_as_bucket_view=True, **options)  # type: ignore[arg-type]

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
                norms = [part for part in self.model.encoder.modules() if isinstance(part, _BatchNorm)]
                self.ranks.average(
                    [x for norm in norms for x in (norm.running_mean, norm.running_var) if x is not None]
                )

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


def has_unused_parameters(encoder: nn.Module, image: Tensor) -> bool:
    """Whether a trained parameter gets no gradient, as those of a classifier behind the maps.

    DDP fails at such a parameter unless it is told to look for them, which takes time in every step.

    Args:
        encoder: in training mode afterwards.
        image: [1, C, H, W].
    """
    trained = [p for p in encoder.parameters() if p.requires_grad]
    encoder.eval()  # one image has no variance
    with torch.enable_grad():
        maps = [x.sum() for x in encoder(image) if x.requires_grad]
        found = torch.autograd.grad(maps, trained, allow_unused=True) if maps else (None,)
    encoder.train()
    return any(gradient is None for gradient in found)


def replace_batch_norms(module: nn.Module, by: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """The module with others in the place of its batch norms, within it."""
    others: dict[_BatchNorm, nn.Module] = {}  # a batch norm may have several names
    for part in list(module.modules()):
        for name, child in list(part._modules.items()):
            if isinstance(child, _BatchNorm):
                if child not in others:
                    others[child] = by(child)
                setattr(part, name, others[child])
    return module


def joined(norm: _BatchNorm) -> nn.Module:
    """The batch norm over the joint batch of all processes.

    torch's `SyncBatchNorm` runs on GPUs only.
    """
    tensors = (*norm.parameters(), *norm.buffers())
    on_gpu = any(x.is_cuda for x in tensors)
    if on_gpu and isinstance(norm, nn.SyncBatchNorm):
        return norm
    if not _is_plain(norm):
        return _with_joint_statistics(norm)
    return synchronised(norm) if on_gpu else JointBatchNorm(norm)


def separate(norm: _BatchNorm) -> nn.Module:
    """The batch norm over the batch of each process."""
    if not isinstance(norm, nn.SyncBatchNorm):
        return norm
    return _with_hooks(norm, joint=False) if has_hooks(norm) else JointBatchNorm(norm, joint=False)


def _is_plain(norm: _BatchNorm) -> bool:
    """Whether a batch norm does what its parameters, buffers and options say, and nothing else."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm2d)
    return type(norm) in kinds and not has_hooks(norm)


def _with_joint_statistics(norm: _BatchNorm) -> _BatchNorm:
    """A batch norm that computes more than that, as one with an activation: it calls that of the joint batch."""
    if type(norm) is nn.SyncBatchNorm:
        return _with_hooks(norm, joint=True)
    own = norm.forward
    if isinstance(norm, BatchNorm2d):
        norm.joint = True  # its kernel is not torch's function

    def forward(*given: Any, **options: Any) -> Any:
        with _JointStatistics():
            return own(*given, **options)

    norm.forward = forward  # type: ignore[method-assign]
    return norm


def _with_hooks(norm: nn.SyncBatchNorm, joint: bool) -> _BatchNorm:
    """One that runs on CPUs, with the hooks that the given one has: it becomes it, in place."""
    norm.__class__ = JointBatchNorm  # type: ignore[assignment]
    for name, value in (("joint", joint), ("relu", False), ("impl", "auto")):
        setattr(norm, name, value)
    return norm


class _JointStatistics(TorchFunctionMode):
    """Within it `torch.nn.functional.batch_norm` normalises by the joint batch of all processes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return batch_norm(*args, **(kwargs or {}), process_group=dist.group.WORLD)
        return func(*args, **(kwargs or {}))


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
    """Around a second pass over the same views: norms normalise by the views, and their running averages stay."""
    tracking = [m for m in module.modules() if isinstance(m, _BatchNorm | _InstanceNorm) and m.track_running_stats]
    averages = [(norm.running_mean, norm.running_var) for norm in tracking]
    for norm in tracking:
        norm.track_running_stats = False
        if isinstance(norm, _InstanceNorm):  # it updates averages even where they are not tracked
            norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, var) in zip(tracking, averages, strict=True):
            norm.track_running_stats = True
            norm.running_mean, norm.running_var = mean, var
