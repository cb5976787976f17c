"""NT-Xent against the rows of every process of a data-parallel job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from anomem.backends import Impl
from anomem.functional.contrast import Reduction, info_nce, nt_xent
from anomem.validation import require, require_views

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather_rows(rows: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """The rows of all processes, differentiable (also twice).

    The gradient that reaches a process's rows is the sum over what every process did with them.

    Args:
        rows: [..., B, d], of the same shape in each process.
        process_group: torch.distributed's default group when None.

    Returns:
        [..., W·B, d]: those of rank 0, then those of rank 1, and so on; `rows` itself where there is one process.

    Raises:
        ArgumentError: `rows` is no tensor with rows.
    """
    require(isinstance(rows, Tensor) and rows.dim() >= 2, "rows", "a tensor [..., B, d]", rows)
    if _processes(process_group) == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, process_group)  # type: ignore[no-untyped-call]  # [W, ..., B, d]
    return gathered.movedim(0, -3).flatten(-3, -2)


def nt_xent_distributed(
    z: Tensor,
    z_pair: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    reduction: Reduction = "mean",
    process_group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """NT-Xent of this process's pairs, whose negatives are the rows of all processes.

    The mean over the processes is `nt_xent` of the whole batch, and so is, under `DistributedDataParallel`, which
    averages gradients over the processes, every gradient. Each process computes [2B, 2WB] logits, its own rows'
    part, and keeps none of them in a fused implementation.

    Args:
        z: [B, d] or [G, B, d], this process's; of the same shape in each process.
        z_pair: the same shape; row k of `z` and row k of `z_pair` are positives.
        temperature: tau > 0, a number or a learned 0-dim tensor.
        reduction: "mean" over this process's rows, "sum", or "none".
        process_group: torch.distributed's default group when None. Without one this is `nt_xent`.
        impl: which implementation; see the package.

    Returns:
        0-dim, or [(G,) 2B] for "none": the losses of this process's rows of `z`, then of `z_pair`.

    Raises:
        ArgumentError: as `nt_xent`.
    """
    processes = _processes(process_group)
    if processes == 1:
        return nt_xent(z, z_pair, temperature=temperature, reduction=reduction, impl=impl)
    # Before anything is sent: a process that raises leaves the others waiting.
    require_views(z, "z", z_pair, "z_pair")
    rows = torch.cat([z, z_pair], dim=-2)  # [(G,) 2B, d]
    own = torch.arange(rows.shape[-2], device=rows.device)
    first = dist.get_rank(process_group) * len(own)
    return info_nce(
        rows,
        gather_rows(rows, process_group),
        positive=first + own.roll(z.shape[-2]),  # the other view of the same image
        exclude=first + own,
        temperature=temperature,
        reduction=reduction,
        impl=impl,
    )


def _processes(group: ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """[B, ...] in every process -> [W, B, ...]; its transpose is `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
        # torch 2.14 renamed it, and warns about the name it had before.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(everyone.flatten(0, 1), mine.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """[W, B, ...] in every process -> [B, ...]: the sum over the processes of what each has for this one."""

    @staticmethod
    def forward(ctx: Any, everyone: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        mine = everyone.new_empty(everyone.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(mine, everyone.contiguous().flatten(0, 1), group=group)
        return mine

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]
