"""NT-Xent and its rectangular form."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from anomem import backends, rules
from anomem.functional._inputs import autocast_inputs, kind_of_call, scalar, without_autocast
from anomem.ops.library import accumulator, unit_inner_stride
from anomem.reference import info_nce_rows, nt_xent_rows
from anomem.rules import Impl
from anomem.validation import (
    require,
    require_choice,
    require_index,
    require_positive_number,
    require_same_device,
    require_same_kind,
    require_tensor,
    require_views,
    shape_of,
)

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def nt_xent(
    z: Tensor,
    z_pair: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """NT-Xent between two views (SimCLR, Chen et al. 2020, Eq. 1), for one batch or many groups of batches at once.

    Per group U = [z; z_pair], rows L2-normalised, N = 2B, and
    l_i = logsumexp_{j≠i}(u_i·u_j / tau) − u_i·u_{i±B} / tau. The fused implementations keep no [N, N] matrix, except
    that on a CPU a call keeps at most 31 MiB of the similarities for its backward pass.

    Args:
        z: [B, d] or [G, B, d]; need not be normalised.
        z_pair: the same shape; row k of `z` and row k of `z_pair` are positives.
        temperature: tau > 0, a number or a learned 0-dim tensor.
        reduction: "mean" over all groups and rows, "sum", or "none".
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        0-dim, or [(G,) 2B] for "none": the losses of `z`'s rows, then of `z_pair`'s; float32 (float64 for float64).
        A group of one pair has loss 0.

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.

    Example:
        >>> z, z_pair = torch.randn(2, 64, 16)  # two views of 64 images
        >>> nt_xent(z, z_pair, reduction="none").shape
        torch.Size([128])
    """
    kind = kind_of_call("nt_xent", (z, z_pair), impl, part)
    chosen = backends.remembered(kind)
    if chosen is None:
        require_views(z, "z", z_pair, "z_pair")
        require(z.shape[-1] > 0, "z", "rows of length d ≥ 1", z)
        z, z_pair = autocast_inputs(z, z_pair)
        require_same_kind(z_pair, "z_pair", z, "z")
    require_positive_number(temperature, "temperature")
    require_choice(reduction, "reduction", REDUCTIONS)
    grouped = z.dim() == 3
    views = (z, z_pair) if grouped else (z[None], z_pair[None])
    if chosen is None:
        groups, batch, features = views[0].shape
        problem = rules.problem_of(
            "nt_xent", z, z_pair, features=features, rows=2 * batch, columns=2 * batch, groups=groups
        )
        chosen = backends.choose(problem, impl, part=part)
        backends.remember(kind, chosen)
    if chosen == "reference":
        dtype = accumulator(z)
        with without_autocast(z.device.type):
            rows = nt_xent_rows(views[0].to(dtype), views[1].to(dtype), temperature)
    else:
        from anomem.ops import contrast

        learned, tau = scalar(temperature, z)
        rows = contrast.nt_xent(unit_inner_stride(views[0]), unit_inner_stride(views[1]), learned, tau, chosen)
    return _reduce(rows, reduction, grouped)


def info_nce(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    exclude: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """The rectangular contrast (InfoNCE, van den Oord et al. 2018): each row finds its column among all columns.

    l_i = logsumexp_{j ≠ exclude_i}(u_i·v_j / tau) − u_i·v_{positive_i} / tau, rows and columns L2-normalised. With
    rows = columns, exclude = self and positive = the other view this is NT-Xent, row by row.

    Args:
        rows: [R, d] or [G, R, d].
        columns: [C, d] or [G, C, d].
        positive: [R] int64, index of each row's column, the same in every group.
        exclude: [R] int64, a column each row does not see (itself); None to see all. A row that excludes its positive
            is contrasted with its negatives alone (decoupled contrastive learning, Yeh et al. 2022).
        temperature: tau > 0, a number or a learned 0-dim tensor.
        reduction: "mean" over all groups and rows, "sum", or "none".
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        0-dim, or [(G,) R] for "none"; float32 (float64 for float64).

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, an index out of range (checked where it costs no
            synchronisation), or an implementation that cannot run here.

    Example:
        >>> images, texts = torch.randn(2, 64, 16)
        >>> info_nce(images, texts, torch.arange(64), reduction="none").shape
        torch.Size([64])
    """
    require_tensor(rows, "rows", (2, 3), "[R, d] or [G, R, d]")
    require_tensor(columns, "columns", (2, 3), "[C, d] or [G, C, d]")
    same = rows.dim() == columns.dim() and rows.shape[-1] == columns.shape[-1] and rows.shape[:-2] == columns.shape[:-2]
    require(same, "columns", lambda: f"groups and features as `rows`, {shape_of(rows)}", columns)
    require(columns.shape[-2] > 0 and columns.shape[-1] > 0, "columns", "at least one column", columns)
    _check_index(positive, "positive", rows, columns)
    if exclude is not None:
        _check_index(exclude, "exclude", rows, columns)
    require_positive_number(temperature, "temperature")
    require_choice(reduction, "reduction", REDUCTIONS)
    rows, columns = autocast_inputs(rows, columns)
    require_same_kind(columns, "columns", rows, "rows")
    grouped = rows.dim() == 3
    left, right = (rows, columns) if grouped else (rows[None], columns[None])
    problem = rules.problem_of(
        "info_nce",
        rows,
        columns,
        features=left.shape[2],
        rows=left.shape[1],
        columns=right.shape[1],
        groups=left.shape[0],
    )
    chosen = backends.choose(problem, impl, part=part)
    if chosen == "reference":
        dtype = accumulator(rows)
        with without_autocast(rows.device.type):
            loss = info_nce_rows(left.to(dtype), right.to(dtype), positive, exclude, temperature)
    else:
        from anomem.ops import contrast

        learned, tau = scalar(temperature, rows)
        hidden = None if exclude is None else exclude.contiguous()
        loss = contrast.info_nce(
            left.contiguous(), right.contiguous(), positive.contiguous(), hidden, learned, tau, chosen
        )
    return _reduce(loss, reduction, grouped)


def _check_index(index: Tensor, name: str, rows: Tensor, columns: Tensor) -> None:
    require_index(index, name, "[R]", (1,), columns.shape[-2], "columns")
    count = rows.shape[-2]
    require(index.shape[0] == count, name, lambda: f"[{count}], one index per row", index)
    require_same_device(index, name, rows, "rows")


def _reduce(rows: Tensor, reduction: Reduction, grouped: bool) -> Tensor:
    if reduction == "mean":
        return rows.mean()
    if reduction == "sum":
        return rows.sum()
    if rows.requires_grad:
        rows = rows.clone()  # a kernel's backward pass reads its losses again; the caller's may be changed in place
    return rows if grouped else rows.squeeze(0)
