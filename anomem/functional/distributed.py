"""What the processes of a data-parallel job send each other: gathered tensors, shares of groups, sums, and blocks in a
ring.

CPU tensors go from process to process (`isend`, `irecv`): gloo's collectives hand each message to a worker thread and
send it in several pieces. GPU tensors, and whatever torch.compile traces, take torch's functional collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from anomem.ops.library import accumulator
from anomem.validation import require

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = ProcessGroup | DeviceMesh | tuple[DeviceMesh, int | str]

_SIZES = 8
"""Numbers that are compared of a shape: how many there are, and the first seven."""
DIRECT = 1 << 20
"""Bytes that a process may receive for a sum of its own values; a larger one is left to the backend's `all_reduce`."""


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
    counts = checked_counts(rows, "rows", group, counts)
    (everyone,) = gather_together([padded(rows, counts)], group)
    return in_order(everyone, counts)


def of_everyone(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The tensors of all processes, [W, ...], in order of rank; all have the same shape. No gradient."""
    with torch.no_grad():
        return _gathered(values, group)


def gather_together(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """Several tensors of all processes, [W, ...] each, in one message for each dtype; differentiable (also twice).

    Args:
        tensors: of the same shapes in every process.
        group: at least two processes.
    """
    found: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        which = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([tensors[i].flatten() for i in which])
        everyone: Tensor = _Gather.apply(flat, group)  # type: ignore[no-untyped-call]  # [W, Σ numel]
        parts = everyone.split([tensors[i].numel() for i in which], dim=1)
        for i, part in zip(which, parts, strict=True):
            found[i] = part.view(len(part), *tensors[i].shape)
    return found


def share_groups(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """This process's share of the groups, from all processes, in one message for each dtype; differentiable (also
    twice).

    Args:
        tensors: [G, ...], of the same shapes in every process.
        group: W processes, at least two.

    Returns:
        [W, G of this process, ...] each; the first G mod W processes have one group more than the others.
    """
    world, rank = processes(group), dist.get_rank(group)
    found: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        which = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        shares = [tensors[i].tensor_split(world) for i in which]
        flat = torch.cat([share[peer].flatten() for peer in range(world) for share in shares])  # [Σ numel]
        sizes = [sum(share[peer].numel() for share in shares) for peer in range(world)]
        everyone: Tensor = _Swap.apply(flat, sizes, [sizes[rank]] * world, group)  # type: ignore[no-untyped-call]
        # [W · numel of this process's share] -> [W, numel of each tensor's]
        parts = everyone.view(world, sizes[rank]).split([share[rank].numel() for share in shares], dim=1)
        for i, part, share in zip(which, parts, shares, strict=True):
            found[i] = part.view(world, *share[rank].shape)
    return found


def require_counts(counts: Sequence[int], world: int) -> tuple[int, ...]:
    """Rows of each process, after looking at all of them: what one process alone refused would make the others wait."""
    right = isinstance(counts, (tuple, list)) and len(counts) == world
    right = right and all(isinstance(count, int) and count >= 0 for count in counts)
    require(right, "counts", lambda: f"{world} integers ≥ 0, one for each process", lambda: repr(counts))
    return tuple(counts)


def checked_counts(
    rows: Tensor, name: str, group: ProcessGroup | None, counts: Sequence[int] | None
) -> tuple[int, ...]:
    """Rows of each process, after checking that this one has what it should.

    Without `counts` the processes that exchange CPU tensors compare shapes first, in one more message.
    """
    world = processes(group)
    even = counts is None
    counts = (rows.shape[-2],) * world if counts is None else require_counts(counts, world)
    mine = counts[dist.get_rank(group)]
    require(rows.shape[-2] == mine, name, lambda: f"{mine} rows, as `counts` says", rows)
    carried = not (rows.is_cuda and dist.get_backend(group) == "gloo")
    hint = "initialise torch.distributed with nccl"
    require(carried, name, "a tensor that the group's backend gloo carries", rows.device, hint)
    if even and _directly(rows):
        _require_same_shape(rows, name, group)
    return counts


def _require_same_shape(rows: Tensor, name: str, group: ProcessGroup | None) -> None:
    """Refuse another shape in another process, on CPUs: gloo would end the process, or receive a part in silence.

    On a GPU it would wait for the device.
    """
    sizes = [rows.dim(), *rows.shape][:_SIZES]
    everyone = _gathered(torch.tensor(sizes + [0] * (_SIZES - len(sizes))), group).tolist()
    shapes = [tuple(found[1 : 1 + found[0]]) for found in everyone]
    same = all(shape == shapes[0] for shape in shapes)
    expected = "the same shape in every process, or `counts` (rows_per_process) where the rows alone differ"
    require(same, name, expected, lambda: "; ".join(f"{list(shape)} in rank {i}" for i, shape in enumerate(shapes)))


def padded(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """[..., B, d] -> [..., largest B, d]."""
    missing = max(counts) - rows.shape[-2]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def in_order(everyone: Tensor, counts: Sequence[int]) -> Tensor:
    """Padded rows of all processes [W, ..., largest B, d] -> [..., ΣB, d]."""
    joined = everyone.movedim(0, -3)
    if len(set(counts)) == 1:
        return joined.flatten(-3, -2)
    return torch.cat([joined[..., rank, :count, :] for rank, count in enumerate(counts)], dim=-2)


def sum_over(values: Tensor, process_group: Group | None = None) -> Tensor:
    """The sum over the processes, in each of them; differentiable (also twice): the gradients are summed likewise."""
    group = group_of(process_group)
    if processes(group) == 1:
        return values
    if not torch.is_grad_enabled():
        return _summed(values, group)  # without the cost of an autograd function
    total: Tensor = _Sum.apply(values, group)  # type: ignore[no-untyped-call]
    return total


def pass_on(blocks: Sequence[Tensor], count: int, group: ProcessGroup | None) -> list[Tensor]:
    """Send blocks [..., B, d] to the next process and receive those of the previous one, of so many rows."""
    rank, world = dist.get_rank(group), processes(group)
    received = [block.new_empty((*block.shape[:-2], count, block.shape[-1])) for block in blocks]
    following, previous = (rank + 1) % world, (rank - 1) % world
    _exchange([(following, block) for block in blocks], [(previous, block) for block in received], group)
    return received


def _exchange(to: Sequence[tuple[int, Tensor]], of: Sequence[tuple[int, Tensor]], group: ProcessGroup | None) -> None:
    """Send and receive contiguous tensors, each with its rank in the group; empty ones are not sent."""
    to, of = ([(peer, x) for peer, x in tensors if x.numel()] for tensors in (to, of))
    works: Sequence[Any]
    if all(x.is_cpu for _, x in (*to, *of)):
        received = [dist.irecv(x, group=group, group_src=peer) for peer, x in of]
        works = [*(dist.isend(x, group=group, group_dst=peer) for peer, x in to), *received]
    else:  # NCCL starts the messages of one batch together; one after the other they could wait for each other
        messages = [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for peer, x in of]
        messages += [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for peer, x in to]
        works = dist.batch_isend_irecv(messages) if messages else ()
    for work in works:
        work.wait()


def _others(group: ProcessGroup | None) -> list[int]:
    """The ranks of the other processes, from the next one on."""
    rank, world = dist.get_rank(group), processes(group)
    return [peer % world for peer in range(rank + 1, rank + world)]


def _present(group: ProcessGroup | None) -> Any:
    """The group; the default one for None, which functional collectives do not take."""
    return group or dist.group.WORLD


def _directly(tensor: Tensor) -> bool:
    """Whether the processes exchange a tensor without a collective."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _gathered(mine: Tensor, group: ProcessGroup | None) -> Tensor:
    """[...] in every process -> [W, ...]."""
    mine = mine.contiguous()
    if _directly(mine):
        everyone = mine.new_empty((processes(group), *mine.shape))
        parts = everyone.unbind()
        parts[dist.get_rank(group)].copy_(mine)
        others = _others(group)
        _exchange([(peer, mine) for peer in others], [(peer, parts[peer]) for peer in others], group)
        return everyone
    from torch.distributed import _functional_collectives as functional

    # torch 2.14 renamed it, and warns about the name it had before.
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    result: Tensor = functional.wait_tensor(gather(mine[None], 0, _present(group)))
    return result


def _swapped(values: Tensor, to: Sequence[int], of: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Numbers [Σ to] of this process for each one -> [Σ of] of each one for this process, in order of rank."""
    values = values.contiguous()
    if _directly(values):
        received = values.new_empty(sum(of))
        mine, theirs = values.split(to), received.split(of)
        theirs[dist.get_rank(group)].copy_(mine[dist.get_rank(group)])
        others = _others(group)
        _exchange([(peer, mine[peer]) for peer in others], [(peer, theirs[peer]) for peer in others], group)
        return received
    from torch.distributed import _functional_collectives as functional

    swapped = functional.all_to_all_single(values, list(of), list(to), _present(group))
    result: Tensor = functional.wait_tensor(swapped)
    return result


def _summed(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """[...] in every process -> [...]: their sum in each of them."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        summed = functional.all_reduce(values.contiguous(), "sum", _present(group))
        result: Tensor = functional.wait_tensor(summed)
        return result
    others = processes(group) - 1
    if _directly(values) and (others == 1 or others * values.numel() * values.element_size() <= DIRECT):
        # In order of rank: the same bits in every process.
        return _gathered(values, group).sum(0, dtype=values.dtype)
    # A functional collective wraps its result in a tensor that waits at its first use.
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Gather(torch.autograd.Function):
    """`_gathered`; its transpose is `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gathered(mine, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The sum over many processes is not kept in half precision.
        total: Tensor = _Scatter.apply(gradients[0].to(accumulator(gradients[0])), ctx.group)  # type: ignore[no-untyped-call]
        return total.to(gradients[0].dtype), None


class _Scatter(torch.autograd.Function):
    """[W, ...] in every process -> [...]: the sum over the processes of what each has for this one."""

    @staticmethod
    def forward(ctx: Any, everyone: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        everyone = everyone.contiguous()
        if _directly(everyone):
            rank, others = dist.get_rank(group), _others(group)
            found = torch.empty_like(everyone)
            found[rank] = everyone[rank]
            _exchange([(peer, everyone[peer]) for peer in others], [(peer, found[peer]) for peer in others], group)
            return found.sum(0)  # in order of rank
        from torch.distributed import _functional_collectives as functional

        scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
        total = scatter(everyone, "sum", 0, _present(group))
        result: Tensor = functional.wait_tensor(total)[0]
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Swap(torch.autograd.Function):
    """`_swapped`; its transpose sends everything back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, to: Sequence[int], of: Sequence[int], group: ProcessGroup | None) -> Tensor:
        ctx.to, ctx.of, ctx.group = to, of, group
        return _swapped(values, to, of, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back: Tensor = _Swap.apply(gradients[0], ctx.of, ctx.to, ctx.group)  # type: ignore[no-untyped-call]
        return back, None, None, None


class _Sum(torch.autograd.Function):
    """The sum over the processes in each of them: its own transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]
