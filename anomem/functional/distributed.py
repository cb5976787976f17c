"""Contrast and variance across the processes of a data-parallel job: gathered columns, or columns in a ring.

Every function returns a loss whose mean over the processes is the loss of the joint batch. `DistributedDataParallel`
and `fully_shard` average gradients over the processes, so that these are the joint batch's too.

Communication of one process for columns of S bytes each, W processes: gathering receives (W − 1)·S forward and as much
backward. The ring receives (W − 1)·S forward, and backward the columns again and W·S of gradients; it holds two blocks
at a time instead of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from anomem.functional._inputs import autocast_inputs
from anomem.functional.contrast import REDUCTIONS, Reduction, info_nce, nt_xent
from anomem.functional.sampling import variance_hinge
from anomem.ops.library import accumulator
from anomem.reference.retrieve import l2_normalize
from anomem.rules import Impl
from anomem.validation import require, require_choice, require_tensor, require_views

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh | tuple[DeviceMesh, int | str]


def group_of(group: Group | None) -> ProcessGroup | None:
    """The process group of what is accepted as one: itself, a mesh of one dimension, a mesh and a dimension, or None.

    Raises:
        ArgumentError: a mesh of several dimensions without one of them.
    """
    if group is None or not dist.is_available() or isinstance(group, dist.ProcessGroup):
        return group  # type: ignore[return-value]
    mesh, dimension = group if isinstance(group, tuple) else (group, None)
    expected = "a process group, a mesh of one dimension, or (mesh, dimension)"
    is_mesh = hasattr(mesh, "get_group") and (dimension is not None or mesh.ndim == 1)
    require(is_mesh, "process_group", expected, lambda: type(mesh).__name__ if isinstance(group, tuple) else str(group))
    found: ProcessGroup = mesh.get_group(dimension)
    return found


def processes(group: ProcessGroup | None) -> int:
    """Number of processes of a group; 1 without a job."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rows_per_process(rows: int, process_group: Group | None = None) -> tuple[int, ...]:
    """How many rows each process has, for the argument `counts` of uneven batches; the processes exchange them.

    Args:
        rows: of this process.
        process_group: torch.distributed's default group when None.
    """
    group = group_of(process_group)
    if processes(group) == 1:
        return (rows,)
    counts: list[Any] = [None] * processes(group)
    dist.all_gather_object(counts, rows, group=group)
    return tuple(counts)


def gather_rows(rows: Tensor, process_group: Group | None = None, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all processes, differentiable (also twice).

    The gradient that reaches a process's rows is the sum over what every process did with them.

    Args:
        rows: [..., B, d].
        process_group: a group, a mesh of one dimension or (mesh, dimension); torch.distributed's default group when
            None.
        counts: B of each process, where they differ (`rows_per_process`); None says that they do not.

    Returns:
        [..., ΣB, d]: those of rank 0, then those of rank 1, and so on; `rows` itself where there is one process.

    Raises:
        ArgumentError: `rows` is no tensor with rows, has another number of them than `counts` says, or is on a GPU
            while the group's backend is gloo.
    """
    require(isinstance(rows, Tensor) and rows.dim() >= 2, "rows", "a tensor [..., B, d]", rows)
    group = group_of(process_group)
    if processes(group) == 1:
        return rows
    counts = _counts(rows, "rows", group, counts)
    largest = max(counts)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, largest - rows.shape[-2])) if len(set(counts)) > 1 else rows
    gathered: Tensor = _Gather.apply(padded, group)  # type: ignore[no-untyped-call]  # [W, ..., B, d]
    joined = gathered.movedim(0, -3)
    if len(set(counts)) == 1:
        return joined.flatten(-3, -2)
    return torch.cat([joined[..., rank, :count, :] for rank, count in enumerate(counts)], dim=-2)


def nt_xent_distributed(
    z: Tensor,
    z_pair: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    reduction: Reduction = "mean",
    process_group: Group | None = None,
    counts: Sequence[int] | None = None,
    ring: bool = False,
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """NT-Xent of this process's pairs, whose negatives are the rows of all processes.

    The mean over the processes is `nt_xent` of the whole batch, and so is, under `DistributedDataParallel` or
    `fully_shard`, which average gradients over the processes, every gradient. Each process computes [2B, 2ΣB] logits,
    its own rows' part, and keeps none of them in a fused implementation.

    Args:
        z: [B, d] or [G, B, d], this process's.
        z_pair: the same shape; row k of `z` and row k of `z_pair` are positives.
        temperature: tau > 0, a number or a learned 0-dim tensor.
        reduction: "mean" over the rows of all processes (weighted so that the mean over the processes is the mean over
            the rows), "sum" over this process's, or "none".
        process_group: a group, a mesh of one dimension or (mesh, dimension); torch.distributed's default group when
            None. Without one this is `nt_xent`.
        counts: B of each process, where they differ (`rows_per_process`).
        ring: let the columns travel from process to process instead of gathering them; see the module. Once
            differentiable.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        0-dim, or [(G,) 2B] for "none": the losses of this process's rows of `z`, then of `z_pair`.

    Raises:
        ArgumentError: as `nt_xent` and `gather_rows`.
    """
    group = group_of(process_group)
    if processes(group) == 1:
        return nt_xent(z, z_pair, temperature=temperature, reduction=reduction, impl=impl, part=part)
    # Before anything is sent: a process that raises leaves the others waiting.
    require_views(z, "z", z_pair, "z_pair")
    counts = _counts(z, "z", group, counts)
    rows = torch.cat([z, z_pair], dim=-2)  # [(G,) 2B, d]
    own = torch.arange(rows.shape[-2], device=rows.device)
    twice = [2 * count for count in counts]
    losses = _contrast(rows, rows, own.roll(z.shape[-2]), own, temperature, group, twice, ring, impl, part)
    return _reduce(losses, reduction, z.shape[-2], counts)


def info_nce_distributed(
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    reduction: Reduction = "mean",
    process_group: Group | None = None,
    counts: Sequence[int] | None = None,
    ring: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """InfoNCE of this process's rows against the columns of all processes; row i's column is this process's column i.

    Args:
        rows: [B, d] or [G, B, d], this process's.
        columns: the same shape.
        temperature: tau > 0, a number or a learned 0-dim tensor.
        reduction: as in `nt_xent_distributed`.
        process_group: as in `nt_xent_distributed`.
        counts: as in `nt_xent_distributed`.
        ring: as in `nt_xent_distributed`.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Returns:
        0-dim, or [(G,) B] for "none".

    Raises:
        ArgumentError: as `info_nce` and `gather_rows`.
    """
    group = group_of(process_group)
    require_views(rows, "rows", columns, "columns")
    counts = (rows.shape[-2],) if processes(group) == 1 else _counts(rows, "rows", group, counts)
    positive = torch.arange(rows.shape[-2], device=rows.device)
    losses = _contrast(rows, columns, positive, None, temperature, group, counts, ring, impl)
    return _reduce(losses, reduction, rows.shape[-2], counts)


def variance_hinge_distributed(
    x: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    eps: float | Tensor = 1e-4,
    process_group: Group | None = None,
    counts: Sequence[int] | None = None,
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """The variance term over the rows of all processes; the same number in each, its mean over the groups.

    Two sums are exchanged, [G, d] each.

    Args:
        x: [B, d] or [G, B, d], this process's.
        gamma: as in `variance_hinge`.
        eps: as in `variance_hinge`.
        process_group: as in `nt_xent_distributed`.
        counts: as in `nt_xent_distributed`.
        impl: of `variance_hinge`, which this is in a single process.
        part: likewise.

    Returns:
        0-dim, float32 (float64 for float64).

    Raises:
        ArgumentError: as `variance_hinge` and `gather_rows`.
    """
    group = group_of(process_group)
    if processes(group) == 1:
        return variance_hinge(x, gamma=gamma, eps=eps, impl=impl, part=part)
    require_tensor(x, "x", (2, 3), "[B, d] or [G, B, d]")
    total = sum(_counts(x, "x", group, counts))
    require(total >= 2, "x", "at least two rows to have a variance", x)
    numbers = x.to(accumulator(x))
    centred = numbers - sum_over(numbers.sum(-2, keepdim=True), group) / total
    variance = sum_over(centred.square().sum(-2), group) / (total - 1)
    return torch.relu(gamma - torch.sqrt(variance + eps)).mean()


def sum_over(values: Tensor, process_group: Group | None = None) -> Tensor:
    """The sum over the processes, in each of them; differentiable (also twice): the gradients are summed likewise."""
    group = group_of(process_group)
    if processes(group) == 1:
        return values
    total: Tensor = _Sum.apply(values, group)  # type: ignore[no-untyped-call]
    return total


def _counts(rows: Tensor, name: str, group: ProcessGroup | None, counts: Sequence[int] | None) -> tuple[int, ...]:
    """Rows of each process, after checking that this one has what it should."""
    world = processes(group)
    counts = (rows.shape[-2],) * world if counts is None else tuple(counts)
    require(len(counts) == world, "counts", lambda: f"{world} numbers, one for each process", counts)
    mine = counts[dist.get_rank(group)]
    require(rows.shape[-2] == mine, name, lambda: f"{mine} rows, as `counts` says", rows)
    carried = not (rows.is_cuda and dist.get_backend(group) == "gloo")
    hint = "initialise torch.distributed with nccl"
    require(carried, name, "a tensor that the group's backend gloo carries", rows.device, hint)
    return counts


def _reduce(losses: Tensor, reduction: Reduction, rows: int, counts: Sequence[int]) -> Tensor:
    require_choice(reduction, "reduction", REDUCTIONS)
    if reduction == "none":
        return losses
    # The mean over the processes is then the mean over all rows.
    return losses.sum() if reduction == "sum" else losses.mean() * (rows * len(counts) / sum(counts))


def _contrast(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None,
    temperature: float | Tensor,
    group: ProcessGroup | None,
    counts: Sequence[int],
    ring: bool,
    impl: Impl,
    part: bool = False,
) -> Tensor:
    """Losses [(G,) R]; positive and exclude count this process's columns."""
    rows, columns = autocast_inputs(rows, columns)  # half the bytes to send, and the same precision backward
    if processes(group) == 1:
        return info_nce(rows, columns, positive, exclude, temperature=temperature, reduction="none", impl=impl)
    if ring:
        tau = temperature if isinstance(temperature, Tensor) else None
        number = 1.0 if tau is not None else temperature
        result: Tensor = _Ring.apply(  # type: ignore[no-untyped-call]
            rows, columns, tau, number, positive, exclude, group, tuple(counts), (impl, part)
        )
        return result
    first = sum(counts[: dist.get_rank(group)])
    return info_nce(
        rows,
        gather_rows(columns, group, counts),
        positive=first + positive,
        exclude=None if exclude is None else first + exclude,
        temperature=temperature,
        reduction="none",
        impl=impl,
        part=part,
    )


class _Gather(torch.autograd.Function):
    """[B, ...] in every process -> [W, B, ...]; its transpose is `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup | None) -> Tensor:
        from torch.distributed import _functional_collectives as functional

        ctx.group = group
        # torch 2.14 renamed it, and warns about the name it had before.
        gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
        everyone = gather(rows.contiguous()[None], 0, group or dist.group.WORLD)
        result: Tensor = functional.wait_tensor(everyone)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The sum over many processes is not kept in half precision.
        total: Tensor = _Scatter.apply(gradients[0].to(accumulator(gradients[0])), ctx.group)  # type: ignore[no-untyped-call]
        return total.to(gradients[0].dtype), None


class _Scatter(torch.autograd.Function):
    """[W, B, ...] in every process -> [B, ...]: the sum over the processes of what each has for this one."""

    @staticmethod
    def forward(ctx: Any, everyone: Tensor, group: ProcessGroup | None) -> Tensor:
        from torch.distributed import _functional_collectives as functional

        ctx.group = group
        scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
        total = scatter(everyone.contiguous(), "sum", 0, group or dist.group.WORLD)
        result: Tensor = functional.wait_tensor(total)[0]
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """The sum over the processes in each of them: its own transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        if not torch.compiler.is_compiling():
            # A functional collective wraps its result in a tensor that waits at its first use.
            total = values.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=group)
            return total
        from torch.distributed import _functional_collectives as functional

        summed = functional.all_reduce(values.contiguous(), "sum", group or dist.group.WORLD)
        result: Tensor = functional.wait_tensor(summed)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Ring(torch.autograd.Function):
    """Losses [(G,) R] of rows against the columns of all processes, which pass by block by block.

    With a_b = logsumexp over block b minus the positive, the loss is logsumexp_b a_b. The own block's a_b is the loss
    within it, so that small losses keep their digits. Backward the blocks pass by again, each with the gradient that
    it has collected; da_b has the weight exp(a_b − loss).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        tau: Tensor | None,
        number: float,
        positive: Tensor,
        exclude: Tensor | None,
        group: ProcessGroup | None,
        counts: tuple[int, ...],
        impl: tuple[Impl, bool],
    ) -> Tensor:
        ctx.options = number, group, counts, impl
        block, rank = columns.contiguous(), dist.get_rank(group)
        loss = _own(rows, columns, tau, number, positive, exclude, impl)
        for hop in range(1, len(counts)):
            block = _passed_on(block, counts[(rank - hop) % len(counts)], group)
            loss = torch.logaddexp(loss, _other(rows, block, columns, tau, number, positive, impl))
        ctx.save_for_backward(rows, columns, tau, positive, exclude, loss)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, tau, positive, exclude, loss = ctx.saved_tensors
        number, group, counts, impl = ctx.options
        rank, world = dist.get_rank(group), len(counts)
        leaves = [None if x is None else x.detach().requires_grad_() for x in (rows, columns, tau)]
        totals = [None if x is None else torch.zeros_like(x, dtype=accumulator(x)) for x in leaves]

        def add(term: Tensor, inputs: list[Tensor | None], into: list[Tensor | None]) -> None:
            pairs = [(x, total) for x, total in zip(inputs, into, strict=True) if x is not None and total is not None]
            weight = upstream * (term.detach() - loss).exp()
            found = torch.autograd.grad(term, [x for x, _ in pairs], weight, allow_unused=True)
            for (_, total), gradient in zip(pairs, found, strict=True):
                if gradient is not None:
                    total += gradient

        with torch.enable_grad():
            add(_own(leaves[0], leaves[1], leaves[2], number, positive, exclude, impl), leaves, totals)
        block = columns.contiguous()
        collected = torch.zeros_like(block, dtype=accumulator(block))
        for hop in range(1, world):
            count = counts[(rank - hop) % world]
            block, collected = _passed_on(block, count, group), _passed_on(collected, count, group)
            passing = block.detach().requires_grad_()
            with torch.enable_grad():
                term = _other(leaves[0], passing, leaves[1], leaves[2], number, positive, impl)
                add(term, [leaves[0], passing, leaves[1], leaves[2]], [totals[0], collected, totals[1], totals[2]])
        collected = _passed_on(collected, counts[rank], group)  # home
        d_rows, d_columns, d_tau = totals
        assert d_rows is not None
        assert d_columns is not None
        d_tau = None if d_tau is None else d_tau.to(tau.dtype)
        return d_rows.to(rows.dtype), (d_columns + collected).to(columns.dtype), d_tau, *[None] * 6


def _own(
    rows: Any, columns: Any, tau: Any, number: float, positive: Tensor, exclude: Tensor | None, impl: tuple[Impl, bool]
) -> Tensor:
    """Losses of the rows against the columns of their own process: [(G,) R]."""
    temperature = number if tau is None else tau
    return info_nce(
        rows, columns, positive, exclude, temperature=temperature, reduction="none", impl=impl[0], part=impl[1]
    )


def _other(
    rows: Any, block: Any, columns: Any, tau: Any, number: float, positive: Tensor, impl: tuple[Impl, bool]
) -> Tensor:
    """Logsumexp over another process's block, minus the positive among the own columns: [(G,) R]."""
    temperature = number if tau is None else tau
    matched = torch.arange(len(positive), device=positive.device) % block.shape[-2]  # any column of the block
    within = info_nce(rows, block, matched, temperature=temperature, reduction="none", impl=impl[0], part=impl[1])
    wide = accumulator(rows)
    unit, theirs, ours = (l2_normalize(x.to(wide)) for x in (rows, block, columns))
    difference = theirs.index_select(-2, matched) - ours.index_select(-2, positive)
    return within + (unit * difference).sum(-1) / temperature


def _passed_on(block: Tensor, count: int, group: ProcessGroup | None) -> Tensor:
    """Send a block to the next process and receive that of the previous one, of so many rows."""
    rank, world = dist.get_rank(group), processes(group)
    following, previous = (
        dist.get_global_rank(group, (rank + step) % world) if group is not None else (rank + step) % world
        for step in (1, -1)
    )
    received = block.new_empty((*block.shape[:-2], count, block.shape[-1]))
    sent = dist.P2POp(dist.isend, block, following, group)
    for work in dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, received, previous, group)]):
        work.wait()
    return received
