"""Loss and log-sum-exp of each row of a contrast, without a [R, C] matrix.

    lse_i = log Σ_{j ≠ exclude_i} exp(u_i·v_j / tau),   l_i = lse_i − u_i·v_{positive_i} / tau
    (SimCLR, Chen et al. 2020, Eq. 1; InfoNCE, van den Oord et al. 2018, Eq. 4)

Each block owns BLOCK_R rows and streams the columns with a shift m_i and a sum Σ_j exp((c_ij − m_i) / tau) of the
cosines c_ij of negatives. The positive is added at the end, l_i = log(1 + Σ_j exp((c_ij − c_i,positive) / tau)).
Where it dominates its row, the loss keeps its digits and is never below 0. A row that excludes its positive has the
logarithm of the sum alone. The shift is the running maximum (online softmax, Milakov & Gimelshein 2018) or, where
`FIXED`, the bound 1. With few rows the columns are cut into splits. A second kernel adds the sums of the splits in a
fixed order, so every run gives the same bits. Products of exact float32 are the library's, chunk of rows by chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.contrast_rows import (
    chunks,
    cosines,
    has_fixed_shift,
    inverse_temperature,
    is_special,
    load_index,
    load_mantissa,
    opposite,
    plan,
    sliced_product,
)
from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    LN2,
    LOG2E,
    cdiv,
    device_of,
    dot,
    library_product,
    load_tile,
    multiprocessors,
    split_loop,
)
from anomem.kernels.tile_search import Launched, Site, launch
from anomem.kernels.tile_table import Tile

# Of exact float32, which has no product of its own: a pass over rows of cosines.
EXACT = Tile(rows=4, columns=256, warps=4, stages=1, shared=1)


@triton.jit
def larger_shift(shift, other):
    """max(shift, other), and a copy that is safe to subtract: 0 instead of −inf while no column has been seen.

    Not `online_softmax`, whose scores are logits: here shifts are cosines, and 1/tau is applied to the difference.
    """
    new = tl.maximum(shift, other)
    return new, tl.where(new == -float("inf"), 0.0, new)


@triton.jit
def log1p(x):
    """log(1 + x) [BLOCK] of x from 0 to 1, by Kahan's correction; NaN stays NaN."""
    one_more = 1.0 + x
    return tl.where(one_more == 1.0, x, tl.log(one_more) * (x / (one_more - 1.0)))


@triton.jit
def store_losses(loss, lse, at, mask, shift, running_sum, matched, hidden, inverse_tau):
    """Store loss and lse of rows, at offsets `at`.

    shift, running_sum: of the negatives, [BLOCK_R]; matched: cosine of the positive, [BLOCK_R]; hidden: whether a row
    excludes its positive, [BLOCK_R] or None.
    """
    # Cosines are subtracted before the multiplication: where the positive dominates, their difference is small.
    log_sum = tl.log2(running_sum) * LN2
    ratio = (shift - matched) * inverse_tau + log_sum
    rest = log1p(tl.exp(-tl.abs(ratio)))
    if hidden is not None:
        rest = tl.where(hidden, 0.0, rest)
    negatives = ratio > 0
    if hidden is not None:
        negatives = negatives | hidden
    tl.store(loss + at, tl.where(negatives, ratio, 0.0) + rest, mask=mask)
    # The logit of a column that dominates its row, rounded like here, minus lse is then exactly 0.
    row_lse = tl.where(negatives, shift * inverse_tau + (log_sum + rest), matched * inverse_tau + rest)
    tl.store(lse + at, row_lse, mask=mask)


@triton.jit(
    do_not_specialize=[
        "groups", "row_count", "column_count", "splits", "columns_per_split", "first_row", "end_row",
    ]
)  # fmt: skip
def contrast_forward_kernel(
    scaled_rows,  # [G, R, D]
    scaled_columns,  # [G, C, D]
    row_inverse,  # [G, R] float32, 1/|row|
    column_inverse,  # [G, C] float32
    positive,  # [R] int64; None for two joined views, in which each row is hidden from itself
    exclude,  # [R] int64, or None
    temperature,  # 0-dim float32, or None
    loss,  # [G, R] float32
    lse,  # [G, R] float32
    partial,  # [3, splits, G, R] float32: shift, sum and positive's cosine by split; None for one split
    products,  # [G, end_row − first_row, C] float32, s_x s_yᵀ of exact float32; None: they are computed here
    inverse_tau,
    groups,
    row_count,
    column_count,
    splits,
    columns_per_split,
    first_row,  # with products: of their rows; None without
    end_row,
    FEATURES: tl.constexpr,
    FIXED: tl.constexpr,
    SLICED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of rows against one split of the columns. Grid: [G · splits · tiles of rows], tiles fastest."""
    begin_row = 0
    if products is not None:
        row_end = end_row
        begin_row = first_row
    else:
        row_end = row_count
    tiles = tl.cdiv(row_end - begin_row, BLOCK_R)
    tile = tl.program_id(0) % tiles
    split = (tl.program_id(0) // tiles) % splits
    group = (tl.program_id(0) // tiles // splits).to(tl.int64)
    x = scaled_rows + group * row_count * FEATURES
    y = scaled_columns + group * column_count * FEATURES

    row = begin_row + tile * BLOCK_R
    rows = row + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    if positive is None:
        target = opposite(rows, row_count)  # [BLOCK_R]
    else:
        target = load_index(positive, rows, row_count)
        valid = (target >= 0) & (target < column_count)
        if exclude is not None:
            excluded = load_index(exclude, rows, row_count)  # [BLOCK_R]
            valid = valid & (excluded >= 0) & (excluded < column_count)
    inverse_tau = inverse_temperature(inverse_tau, temperature)
    scale = inverse_tau * LOG2E
    x_factor = load_mantissa(row_inverse + group * row_count, rows, row_count)  # [BLOCK_R]
    if products is not None:
        corner = products + (group * (row_end - begin_row) + tile * BLOCK_R) * column_count
        line = tl.arange(0, BLOCK_R).to(tl.int64)[:, None] * column_count  # [BLOCK_R, 1]
    elif not SLICED:
        x_tile = load_tile(x, row, row_count, 0, FEATURES, BLOCK_R, BLOCK_D)  # [BLOCK_R, BLOCK_D]

    shift = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    if FIXED:
        shift = tl.full((BLOCK_R,), 1.0, tl.float32)
    running_sum = tl.zeros((BLOCK_R,), tl.float32)
    matched = tl.zeros((BLOCK_R,), tl.float32)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, column_count)
    for first in range(begin, end, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        if products is not None:
            inside = (rows < row_end)[:, None] & (columns < column_count)[None, :]
            product = tl.load(corner + line + columns[None, :], mask=inside, other=0.0)  # [BLOCK_R, BLOCK_C]
        elif SLICED:
            product = sliced_product(
                x, y, row, first, row_count, column_count, FEATURES, PRECISION, BLOCK_R, BLOCK_C, BLOCK_D
            )
        else:
            y_tile = load_tile(y, first, column_count, 0, FEATURES, BLOCK_C, BLOCK_D)  # [BLOCK_C, BLOCK_D]
            product = dot(x_tile, tl.trans(y_tile), tl.zeros((BLOCK_R, BLOCK_C), tl.float32), PRECISION)
        y_factor = load_mantissa(column_inverse + group * column_count, columns, column_count)  # [BLOCK_C]
        cosine = cosines(product, x_factor, y_factor)  # [BLOCK_R, BLOCK_C]
        if positive is None:
            if is_special(row, first, column_count, BLOCK_R, BLOCK_C):
                is_positive = columns[None, :] == target[:, None]
                matched += tl.sum(tl.where(is_positive, cosine, 0.0), axis=1)
                outside = (columns[None, :] == rows[:, None]) | (columns >= column_count)[None, :]
                cosine = tl.where(outside | is_positive, -float("inf"), cosine)
        else:
            is_positive = columns[None, :] == target[:, None]
            matched += tl.sum(tl.where(is_positive, cosine, 0.0), axis=1)
            if exclude is not None:
                cosine = tl.where(columns[None, :] == excluded[:, None], -float("inf"), cosine)
            cosine = tl.where(is_positive | (columns >= column_count)[None, :], -float("inf"), cosine)
        if FIXED:
            running_sum += tl.sum(tl.exp2(cosine * scale - scale), axis=1)
        else:
            new, safe = larger_shift(shift, tl.max(cosine, axis=1))
            running_sum = running_sum * tl.exp2((shift - safe) * scale)
            running_sum += tl.sum(tl.exp2((cosine - safe[:, None]) * scale), axis=1)
            shift = new
    if positive is not None:
        running_sum = tl.where(valid, running_sum, float("nan"))

    mask = rows < row_end
    if partial is None:
        hidden = None
        if exclude is not None:
            hidden = excluded == target
        store_losses(loss, lse, group * row_count + rows, mask, shift, running_sum, matched, hidden, inverse_tau)
    else:
        at = (split * groups + group) * row_count + rows
        part = tl.full((), splits, tl.int64) * groups * row_count
        tl.store(partial + at, shift, mask=mask)
        tl.store(partial + part + at, running_sum, mask=mask)
        tl.store(partial + 2 * part + at, matched, mask=mask)


@triton.jit(do_not_specialize=["count", "row_count", "splits"])
def contrast_add_splits_kernel(
    partial,  # [3, splits, G · R] float32
    positive,  # [R] int64, or None as in `contrast_forward_kernel`
    exclude,  # [R] int64, or None
    temperature,  # 0-dim float32, or None
    loss,  # [G · R] float32
    lse,  # [G · R] float32
    inverse_tau,
    count,
    row_count,
    splits,
    BLOCK_R: tl.constexpr,
):
    """Loss and lse from the sums of the splits, added in order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    mask = rows < count
    inverse_tau = inverse_temperature(inverse_tau, temperature)
    scale = inverse_tau * LOG2E
    shift = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_R,), tl.float32)
    matched = tl.zeros((BLOCK_R,), tl.float32)
    for split in range(splits):
        at = tl.full((), split, tl.int64) * count + rows
        part = tl.full((), splits, tl.int64) * count
        other = tl.load(partial + at, mask=mask, other=0.0)
        new, safe = larger_shift(shift, other)
        running_sum = running_sum * tl.exp2((shift - safe) * scale)
        running_sum += tl.load(partial + part + at, mask=mask, other=0.0) * tl.exp2((other - safe) * scale)
        matched += tl.load(partial + 2 * part + at, mask=mask, other=0.0)
        shift = new
    hidden = None
    if exclude is not None:
        hidden = tl.load(positive + rows % row_count) == tl.load(exclude + rows % row_count)  # [BLOCK_R]
    store_losses(loss, lse, rows, mask, shift, running_sum, matched, hidden, inverse_tau)


def losses(
    scaled_rows: Tensor,
    scaled_columns: Tensor,
    row_inverse: Tensor,
    column_inverse: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row.

    Args:
        scaled_rows: [G, R, D] contiguous; see `contrast_rows`.
        scaled_columns: [G, C, D] contiguous; the same tensor for two joined views.
        row_inverse: [G, R] float32, 1/|row|.
        column_inverse: [G, C] float32.
        positive: [R] int64, or None for two joined views.
        exclude: [R] int64, or None.
        temperature: 0-dim float32, or None for the constant `tau`.
        tau: see `temperature`.

    Returns:
        (loss, lse), [G, R] float32; NaN for a row whose index is out of range.
    """
    groups, row_count, features = scaled_rows.shape
    column_count = scaled_columns.shape[1]
    loss = scaled_rows.new_empty(groups, row_count, dtype=torch.float32)
    lse = torch.empty_like(loss)
    if loss.numel() == 0:
        return loss, lse
    cut = plan("contrast_forward", scaled_rows)
    if cut is None:
        with device_of(scaled_rows):
            _exact(
                scaled_rows, scaled_columns, row_inverse, column_inverse, positive, exclude, temperature, tau, loss, lse
            )
        return loss, lse
    fixed = has_fixed_shift(scaled_rows, temperature, tau)

    def run(tile: Tile) -> Launched:
        blocks = groups * cdiv(row_count, tile.rows)
        parts, columns_per_part = split_loop(column_count, tile.columns, blocks, multiprocessors(scaled_rows))
        partial = loss.new_empty(3, parts, groups, row_count) if parts > 1 else None
        compiled = launch_kernel(contrast_forward_kernel, (blocks * parts,),
            scaled_rows, scaled_columns, row_inverse, column_inverse, positive, exclude, temperature,
            loss, lse, partial, None, 1 / tau, groups, row_count, column_count, parts, columns_per_part, None, None,
            FEATURES=features, FIXED=fixed, SLICED=cut.sliced, PRECISION=cut.precision,
            BLOCK_R=tile.rows, BLOCK_C=tile.columns, BLOCK_D=cut.block_d, **tile.options,
        )  # fmt: skip
        if partial is not None:
            launch_kernel(contrast_add_splits_kernel, (cdiv(loss.numel(), 256),),
                partial, positive, exclude, temperature, loss, lse, 1 / tau, loss.numel(), row_count, parts,
                BLOCK_R=256, num_warps=4,
            )  # fmt: skip
        return Launched(compiled)

    facts = {"dtype": scaled_rows.dtype, "d": features, "joined": positive is None, "exclude": exclude is not None}
    facts |= {"learned": temperature is not None, "fixed": fixed}
    with device_of(scaled_rows):
        launch(Site(cut.entry, facts, groups * row_count, column_count, scaled_rows.device), run)
    return loss, lse


def _exact(
    scaled_rows: Tensor,
    scaled_columns: Tensor,
    row_inverse: Tensor,
    column_inverse: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    loss: Tensor,
    lse: Tensor,
) -> None:
    """Write loss and lse of exact float32; the other arguments as in `losses`."""
    column_count = scaled_columns.shape[1]
    for chunk in chunks(scaled_rows, column_count):
        of, first, end = chunk.groups, chunk.rows.start, chunk.rows.stop
        x, y = scaled_rows[of], scaled_columns[of]
        launch_kernel(contrast_forward_kernel, (x.shape[0] * cdiv(end - first, EXACT.rows),),
            x, y, row_inverse[of], column_inverse[of], positive, exclude, temperature,
            loss[of], lse[of], None, library_product(x[:, chunk.rows], y.mT),
            1 / tau, x.shape[0], x.shape[1], column_count, 1, column_count, first, end,
            FEATURES=x.shape[2], FIXED=False, SLICED=False, PRECISION="ieee",
            BLOCK_R=EXACT.rows, BLOCK_C=EXACT.columns, BLOCK_D=16, **EXACT.options,
        )  # fmt: skip
