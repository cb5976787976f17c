"""Contrast and variance across the processes of a data-parallel job: shared groups, gathered columns, or columns in a
ring.

Every function returns a loss whose mean over the processes is the loss of the joint batch. `DistributedDataParallel`
and `fully_shard` average gradients over the processes, so that these are the joint batch's too.

Groups are contrasted each on its own. Where there are at least as many as processes, NT-Xent divides them among the
processes: each computes whole symmetric groups, which is half the work of its rows' part of every group.

Communication of one process for columns of S bytes each, W processes: sharing groups receives (W − 1)/W · S in each
pass, gathering (W − 1)·S. The ring receives (W − 1)·S forward, and backward the columns again and W·S of gradients; it
holds two blocks at a time instead of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from anomem.functional._inputs import autocast_inputs
from anomem.functional.contrast import REDUCTIONS, Reduction, info_nce, nt_xent
from anomem.functional.distributed import (
    checked_counts,
    gather_together,
    group_of,
    in_order,
    padded,
    pass_on,
    processes,
    share_groups,
)
from anomem.functional.sampling import require_hinge, variance_hinge
from anomem.ops.library import accumulator
from anomem.reference.retrieve import l2_normalize
from anomem.rules import Impl
from anomem.validation import require, require_choice, require_tensor, require_views

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from anomem.functional.distributed import Group

EPS = 1e-4
"""Of the variance term of `joint_terms`, as in `variance_hinge`."""


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
    `fully_shard`, which average gradients over the processes, every gradient. Each process computes whole groups where
    `reduction` is "mean" and there are at least as many groups as processes; otherwise its own rows' part, [2B, 2ΣB]
    logits of every group. A fused implementation keeps none of them.

    Args:
        z: [B, d] or [G, B, d], this process's; G and d are the same in every process.
        z_pair: the same shape; row k of `z` and row k of `z_pair` are positives.
        temperature: tau > 0, a number or a learned 0-dim tensor.
        reduction: "mean" over the rows of all processes (weighted so that the mean over the processes is the mean over
            the rows), "sum" over this process's, or "none".
        process_group: a group, a mesh of one dimension or (mesh, dimension); torch.distributed's default group when
            None. Without one this is `nt_xent`.
        counts: B of each process, where they differ (`rows_per_process`).
        ring: where groups are not shared, let the columns travel from process to process instead of gathering them; see
            the module. Once differentiable.
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
    counts = checked_counts(z, "z", group, counts)
    if reduction == "mean" and _can_share(z, group):
        _require_rows(counts)
        ((ours, theirs, weight),) = _shared([autocast_inputs(z, z_pair)], [counts], group)
        return weight * nt_xent(ours, theirs, temperature=temperature, impl=impl, part=part)
    contrast = _Contrast.of_pairs(z, z_pair, counts, group)
    return _reduce(contrast.losses(temperature, ring, impl, part), reduction, contrast)


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
    part: bool = False,
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
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        0-dim, or [(G,) B] for "none".

    Raises:
        ArgumentError: as `info_nce` and `gather_rows`.
    """
    group = group_of(process_group)
    require_views(rows, "rows", columns, "columns")
    counts = (rows.shape[-2],) if processes(group) == 1 else checked_counts(rows, "rows", group, counts)
    rows, columns = autocast_inputs(rows, columns)  # half the bytes to send, and the same precision backward
    positive = torch.arange(rows.shape[-2], device=rows.device)
    contrast = _Contrast(rows, columns, positive, None, counts, group)
    return _reduce(contrast.losses(temperature, ring, impl, part), reduction, contrast)


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

    Mean and squared deviations of each process are exchanged, [3, G, d], and merged (Chan, Golub and LeVeque 1983).

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
    counts = checked_counts(x, "x", group, counts)
    require(sum(counts) >= 2, "x", "at least two rows to have a variance", x)
    require(x.shape[-1] > 0, "x", "rows of length d ≥ 1", x)
    require_hinge(gamma, eps)
    (statistics,) = gather_together([_statistics(x)], group)
    return _hinge(statistics, counts, gamma, eps)


def joint_terms(
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    contrasted: bool,
    temperature: float | Tensor,
    gammas: Sequence[float | Tensor],
    group: ProcessGroup | None,
    counts: Sequence[int] | None,
    ring: bool,
    impl: Impl,
) -> list[tuple[Tensor | None, Tensor]]:
    """Contrast and variance of several scales over all processes: two tensors whose means over the processes are the
    joint batch's.

    As `nt_xent_distributed` of a pair and `variance_hinge_distributed` of its second, scale by scale. The scales whose
    groups are shared have one message each way, and so have the others; in the ring the columns of each of these travel
    on their own.

    Args:
        pairs: S times two tensors [G_s, B, d_s] of one dtype.
        contrasted: whether the contrast is wanted.
        temperature: tau > 0.
        gammas: of each scale's variance.
        group: at least two processes.
        counts: B of each process, where they differ.
        ring: as in `nt_xent_distributed`.
        impl: a preference; see `anomem.backends`.
    """
    every = [checked_counts(second, "z", group, counts) for _, second in pairs]
    for rows, gamma in zip(every, gammas, strict=True):
        _require_rows(rows)
        require_hinge(gamma, EPS)
    scales = list(zip(pairs, every, gammas, strict=True))
    if not contrasted:
        return [(None, variance) for variance in _gathered_terms(scales, (), group)[1]]
    shared = [i for i, (first, _) in enumerate(pairs) if _can_share(first, group)]
    others = [i for i in range(len(pairs)) if i not in shared]
    found: dict[int, tuple[Tensor | None, Tensor]] = {}
    if shared:
        whole = _shared([pairs[i] for i in shared], [every[i] for i in shared], group)
        for i, (ours, theirs, weight) in zip(shared, whole, strict=True):
            contrast = nt_xent(ours, theirs, temperature=temperature, impl=impl, part=True)
            variance = variance_hinge(theirs, gamma=gammas[i], eps=EPS, impl=impl, part=True)
            found[i] = weight * contrast, weight * variance
    if others:
        contrasts = [_Contrast.of_pairs(*pairs[i], every[i], group) for i in others]
        gathered, variances = _gathered_terms([scales[i] for i in others], () if ring else contrasts, group)
        columns: Sequence[Tensor | None] = gathered or [None] * len(contrasts)
        for i, one, everyone, variance in zip(others, contrasts, columns, variances, strict=True):
            losses = one.losses(temperature, ring, impl, True, everyone)
            found[i] = _reduce(losses, "mean", one), variance
    return [found[i] for i in range(len(pairs))]


def _can_share(z: Tensor, group: ProcessGroup | None) -> bool:
    """Whether there is a group for each process."""
    return z.dim() == 3 and len(z) >= processes(group)


def _shared(
    pairs: Sequence[tuple[Tensor, Tensor]], every: Sequence[Sequence[int]], group: ProcessGroup | None
) -> list[tuple[Tensor, Tensor, float]]:
    """Of pairs [G, B, d] this process's groups with the rows of all processes, [g, ΣB, d], in one message.

    The third is the weight of a mean over the g groups: the mean over the processes is then that over all groups.
    """
    padded_rows = [padded(x, counts) for pair, counts in zip(pairs, every, strict=True) for x in pair]
    whole = share_groups(padded_rows, group)
    found = []
    for i, ((first, _), counts) in enumerate(zip(pairs, every, strict=True)):
        ours, theirs = (in_order(everyone, counts) for everyone in whole[2 * i : 2 * i + 2])
        found.append((ours, theirs, len(ours) * processes(group) / len(first)))
    return found


def _gathered_terms(
    scales: Sequence[tuple[tuple[Tensor, Tensor], Sequence[int], float | Tensor]],
    contrasts: Sequence[_Contrast],
    group: ProcessGroup | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The columns of the contrasts, and the variance of each scale, in one message."""
    statistics = [_statistics(second) for (_, second), _, _ in scales]
    columns = [padded(contrast.columns, contrast.counts) for contrast in contrasts]
    received = gather_together([*columns, *statistics], group)
    variances = [
        _hinge(everyone, rows, gamma, EPS)
        for everyone, (_, rows, gamma) in zip(received[len(columns) :], scales, strict=True)
    ]
    return received[: len(columns)], variances


class _Contrast(NamedTuple):
    """This process's rows and columns of a contrast with the columns of all processes."""

    rows: Tensor
    """[(G,) R, d]."""
    columns: Tensor
    """[(G,) R, d]."""
    positive: Tensor
    """[R], index of each row's column in this process."""
    exclude: Tensor | None
    """[R], index of the column in this process that a row does not see."""
    counts: Sequence[int]
    """R of each process."""
    group: ProcessGroup | None

    @classmethod
    def of_pairs(cls, z: Tensor, z_pair: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> _Contrast:
        """NT-Xent of pairs [(G,) B, d]: each row sees all rows but itself."""
        rows = torch.cat(autocast_inputs(z, z_pair), dim=-2)  # [(G,) 2B, d]
        own = torch.arange(rows.shape[-2], device=rows.device)
        return cls(rows, rows, own.roll(z.shape[-2]), own, [2 * count for count in counts], group)

    def losses(
        self, temperature: float | Tensor, ring: bool, impl: Impl, part: bool = False, everyone: Tensor | None = None
    ) -> Tensor:
        """[(G,) R]; `everyone` has the padded columns of all processes, where they have been gathered already."""
        rows, columns, positive, exclude, counts, group = self
        if processes(group) == 1:
            return info_nce(
                rows, columns, positive, exclude, temperature=temperature, reduction="none", impl=impl, part=part
            )
        if ring:
            tau = temperature if isinstance(temperature, Tensor) else None
            number = 1.0 if tau is not None else temperature
            result: Tensor = _Ring.apply(  # type: ignore[no-untyped-call]
                rows, columns, tau, number, positive, exclude, group, tuple(counts), (impl, part)
            )
            return result
        if everyone is None:
            (everyone,) = gather_together([padded(columns, counts)], group)
        first = sum(counts[: dist.get_rank(group)])
        return info_nce(
            rows,
            in_order(everyone, counts),
            positive=first + positive,
            exclude=None if exclude is None else first + exclude,
            temperature=temperature,
            reduction="none",
            impl=impl,
            part=part,
        )


def _reduce(losses: Tensor, reduction: Reduction, contrast: _Contrast) -> Tensor:
    require_choice(reduction, "reduction", REDUCTIONS)
    if reduction != "mean":
        return losses.sum() if reduction == "sum" else losses
    _require_rows(contrast.counts)
    # The mean over the processes is then the mean over all rows; a process may be without rows.
    return losses.sum() / (losses.shape[:-1].numel() * sum(contrast.counts) / len(contrast.counts))


def _require_rows(counts: Sequence[int]) -> None:
    expected = "at least one row in some process: the mean of no losses is NaN"
    require(sum(counts) > 0, "counts", expected, tuple(counts))


def _statistics(x: Tensor) -> Tensor:
    """Of rows [(G,) B, d] the numbers that variances are merged from: [3, (G,) d] in the dtype of sums.

    A number near the mean, by which the rows are shifted; the mean of the shifted rows, which is its rounding error;
    the sum of their squares about it. The first carries no gradient: the others' are right for any shift.
    """
    numbers = x.to(accumulator(x))
    count = max(x.shape[-2], 1)
    shift = numbers.detach().sum(-2) / count
    shifted = numbers - shift[..., None, :]
    mean = shifted.sum(-2) / count
    return torch.stack([shift, mean, shifted.square().sum(-2) - count * mean.square()])


def _hinge(statistics: Tensor, counts: Sequence[int], gamma: float | Tensor, eps: float | Tensor) -> Tensor:
    """The variance term from the statistics of all processes [W, 3, (G,) d]; 0-dim."""
    shift, mean, squares = statistics.unbind(1)  # [W, (G,) d] each
    filled = list(counts).index(max(counts))
    # Differences of shifts are exact, or nearly so: the mean's own digits are gone.
    means = (shift - shift[filled]) + mean
    total = sum(counts)
    apart = _weighted(counts, (means - _weighted(counts, means) / total).square())
    variance = (squares.sum(0) + apart) / (total - 1)
    return torch.relu(gamma - torch.sqrt(variance + eps)).mean()


def _weighted(counts: Sequence[int], values: Tensor) -> Tensor:
    """Σ_w counts_w · values_w of [W, ...]; the counts are not sent to a device, which would wait."""
    if len(set(counts)) == 1:
        return values.sum(0) * counts[0]
    return torch.stack([value * count for value, count in zip(values.unbind(), counts, strict=True)]).sum(0)


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
        loss = rows.new_zeros(rows.shape[:-1], dtype=accumulator(rows))
        if counts[rank]:
            loss = _own(rows, columns, tau, number, positive, exclude, impl)
        for hop in range(1, len(counts)):
            count = counts[(rank - hop) % len(counts)]
            (block,) = pass_on([block], count, group)
            if count:
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

        if counts[rank]:
            with torch.enable_grad():
                add(_own(leaves[0], leaves[1], leaves[2], number, positive, exclude, impl), leaves, totals)
        block = columns.contiguous()
        collected = torch.zeros_like(block, dtype=accumulator(block))
        for hop in range(1, world):
            count = counts[(rank - hop) % world]
            block, collected = pass_on([block, collected], count, group)
            if not count:
                continue
            passing = block.detach().requires_grad_()
            with torch.enable_grad():
                term = _other(leaves[0], passing, leaves[1], leaves[2], number, positive, impl)
                add(term, [leaves[0], passing, leaves[1], leaves[2]], [totals[0], collected, totals[1], totals[2]])
        (collected,) = pass_on([collected], counts[rank], group)  # home
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
