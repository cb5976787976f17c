"""A contrast by the library's products over chunks of rows, for long rows and for exact float32.

    cosines    exact float32: S = s_x s_yᵀ by the library, which multiplies faster than a tile of fused multiply-adds;
               `contrast_forward` makes losses of it, `contrast_chunked_weights_kernel` weights, in place
    weights    W'_ij = m_i m_j W_ij of rows beyond `contrast_rows.WHOLE`: one kernel with its product, in their dtype
    gradients  du_i = 1/(tau m_i) Σ_j W'_ij s_j,   dv_j = 1/(tau m_j) Σ_i W'_ij s_i,   by the library

W is that of `contrast_backward`, and u = m s that of `contrast_rows`. W' of a chunk of rows lies in a scratch of
bounded size: 4 bytes of a score go through memory in 16 bits, and d may have any length. For two joined views W is
symmetric, and there is no dv. The chunks are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.contrast_backward import joined_weights, load_missing, load_per_row, rectangle_weights
from anomem.kernels.contrast_rows import (
    Chunk,
    Inputs,
    amplification,
    chunks,
    cosines,
    has_fixed_shift,
    inverse_temperature,
    is_special,
    load_index,
    load_mantissa,
    opposite,
    plan,
    row_gradient,
    sliced_product,
)
from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    add_library_product,
    cdiv,
    device_of,
    library_product,
    round_to,
    rounded_product,
)
from anomem.kernels.tile_search import Launched, Site, launch
from anomem.kernels.tile_table import Tile

# Of the weights of exact float32, which have no product of their own.
PASS = Tile(rows=8, columns=256, warps=4, stages=1, shared=1)


@triton.jit(do_not_specialize=["first_row", "end_row", "row_count", "column_count"])
def contrast_chunked_weights_kernel(
    scaled_rows,  # [G, R, D]
    scaled_columns,  # [G, C, D]
    row_inverse,  # [G, R] float32, 1/|row|
    column_inverse,  # [G, C] float32
    loss,  # [G, R] float32
    lse,  # [G, R] float32
    upstream,  # [G, R] float32
    positive,  # [R] int64; None for two joined views
    exclude,  # [R] int64, or None
    temperature,  # 0-dim float32, or None
    peak,  # [G] float32: see `amplification`; None but for float16
    products,  # [G, end_row − first_row, C] float32, s_x s_yᵀ of exact float32; None: they are computed here
    weights,  # [G, end_row − first_row, C], W'; may be the memory of `products`
    moment,  # [programs] float32, partial sums of W c / tau; None if not needed
    inverse_tau,
    first_row,
    end_row,
    row_count,
    column_count,
    FEATURES: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of weights of a chunk of rows. Grid: [G · tiles of rows · tiles of columns], the last fastest."""
    column_tiles = tl.cdiv(column_count, BLOCK_Y)
    row_tiles = tl.cdiv(end_row - first_row, BLOCK_X)
    column = (tl.program_id(0) % column_tiles) * BLOCK_Y
    tile = (tl.program_id(0) // column_tiles) % row_tiles
    group = (tl.program_id(0) // column_tiles // row_tiles).to(tl.int64)
    row = first_row + tile * BLOCK_X
    x_rows = row + tl.arange(0, BLOCK_X)  # [BLOCK_X]
    y_rows = column + tl.arange(0, BLOCK_Y)  # [BLOCK_Y]
    inside = (x_rows < end_row)[:, None] & (y_rows < column_count)[None, :]
    corner = (group * (end_row - first_row) + tile * BLOCK_X) * column_count + column
    at = corner + tl.arange(0, BLOCK_X).to(tl.int64)[:, None] * column_count + tl.arange(0, BLOCK_Y)[None, :]
    if products is None:
        product = sliced_product(
            scaled_rows + group * row_count * FEATURES, scaled_columns + group * column_count * FEATURES,
            row, column, row_count, column_count, FEATURES, PRECISION, BLOCK_X, BLOCK_Y, BLOCK_D,
        )  # fmt: skip
    else:
        product = tl.load(products + at, mask=inside, other=0.0)
    x_factor = load_mantissa(row_inverse + group * row_count, x_rows, row_count)  # [BLOCK_X]
    y_factor = load_mantissa(column_inverse + group * column_count, y_rows, column_count)  # [BLOCK_Y]
    inverse_tau = inverse_temperature(inverse_tau, temperature)
    logit = rounded_product(cosines(product, x_factor, y_factor), inverse_tau)  # [BLOCK_X, BLOCK_Y]

    group_loss = loss + group * row_count
    group_lse = lse + group * row_count
    group_upstream = upstream + group * row_count
    amplify = amplification(peak, group)
    x_lse, x_upstream = load_per_row(group_lse, group_upstream, x_rows, row_count)
    x_upstream = x_upstream * amplify
    if positive is None:
        y_lse, y_upstream = load_per_row(group_lse, group_upstream, y_rows, column_count)
        y_upstream = y_upstream * amplify
        weight = joined_weights(logit, x_lse, x_upstream, tl.exp(-x_lse) * x_upstream, y_lse, y_upstream, FIXED)
        if is_special(row, column, column_count, BLOCK_X, BLOCK_Y):
            x_pull = x_upstream * load_missing(group_loss, x_rows, row_count)  # [BLOCK_X]
            y_pull = y_upstream * load_missing(group_loss, y_rows, column_count)  # [BLOCK_Y]
            is_positive = y_rows[None, :] == opposite(x_rows, row_count)[:, None]
            weight = tl.where(is_positive, -x_pull[:, None] - y_pull[None, :], weight)
            outside = (y_rows[None, :] == x_rows[:, None]) | (y_rows >= column_count)[None, :]
            weight = tl.where(outside, 0.0, weight)
    else:
        hidden = None
        if exclude is not None:
            hidden = load_index(exclude, x_rows, row_count)[:, None]
        missing = load_missing(group_loss, x_rows, row_count)
        target = load_index(positive, x_rows, row_count)
        weight = rectangle_weights(
            logit, x_lse[:, None], x_upstream[:, None], missing[:, None], target[:, None], hidden,
            y_rows[None, :], column_count,
        )  # fmt: skip
    if moment is not None:
        part = tl.sum(tl.where(inside, weight * logit, 0.0), axis=1)
        tl.store(moment + tl.program_id(0), tl.sum(part, axis=0) / amplify)
    weight = weight * (x_factor[:, None] * y_factor[None, :])
    tl.store(weights + at, round_to(weight, weights.dtype.element_ty), mask=inside)


def gradients(
    x: Inputs,
    y: Inputs | None,
    loss: Tensor,
    lse: Tensor,
    upstream: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    wants_moment: bool,
) -> Tensor | None:
    """Write the gradients of the raw rows behind x and y.

    Args:
        x: the rows, or both joined views.
        y: the columns; None for two joined views.
        loss, lse, upstream: [G, R] float32, contiguous.
        positive, exclude: [R] int64; `positive` is None for two joined views, `exclude` may be.
        temperature, tau: as in the forward.
        wants_moment: whether the temperature's gradient is needed.

    Returns:
        Σ_ij W_ij c_ij / tau over all groups, 0-dim float32, if `wants_moment`.
    """
    columns = x if y is None else y
    cut = plan("contrast_backward", x.scaled)
    peak = upstream.abs().amax(1) if x.scaled.dtype == torch.float16 and upstream.numel() else None
    fixed = positive is None and has_fixed_shift(x.scaled, temperature, tau)
    exact = cut is None
    moments = [lse.new_zeros(1)]
    column_sums = None

    def weights_of(chunk: Chunk) -> Tensor:
        """W' [g, r, C]; their moments are added to the list."""
        of = chunk.groups
        own, other = x.scaled[of], columns.scaled[of]
        count, (row_count, features), column_count = own.shape[0], own.shape[1:], other.shape[1]
        first, end = chunk.rows.start, chunk.rows.stop
        products = library_product(own[:, chunk.rows], other.mT) if exact else None
        weights = own.new_empty(count, end - first, column_count) if products is None else products

        def run(tile: Tile) -> Launched:
            programs = count * cdiv(end - first, tile.rows) * cdiv(column_count, tile.columns)
            moment = lse.new_empty(programs) if wants_moment else None
            compiled = launch_kernel(contrast_chunked_weights_kernel, (programs,),
                own, other, x.inverse[of], columns.inverse[of], loss[of], lse[of], upstream[of],
                positive, exclude, temperature, None if peak is None else peak[of], products, weights, moment,
                1 / tau, first, end, row_count, column_count,
                FEATURES=features, FIXED=fixed, PRECISION="ieee" if cut is None else cut.precision,
                BLOCK_X=tile.rows, BLOCK_Y=tile.columns, BLOCK_D=16 if cut is None else cut.block_d, **tile.options,
            )  # fmt: skip
            return Launched(compiled, moment)

        if cut is None:
            moment = run(PASS).result
        else:
            facts = {"dtype": own.dtype, "d": features, "joined": y is None, "exclude": exclude is not None}
            facts |= {"learned": temperature is not None, "fixed": fixed, "moment": wants_moment}
            moment = launch(Site(cut.entry, facts, count * (end - first), column_count, own.device), run)
        if moment is not None:
            moments.append(moment)
        return weights

    with device_of(x.scaled):
        if x.scaled.numel() == 0 or columns.scaled.numel() == 0:
            for gradient in (*x.gradients, *(() if y is None else y.gradients)):
                gradient.zero_()
            return moments[0].sum() if wants_moment else None
        for chunk in chunks(x.scaled, columns.scaled.shape[1]):
            weights = weights_of(chunk)
            sums = library_product(weights, columns.scaled[chunk.groups])  # [g, r, d]
            scale = (None if peak is None else peak[chunk.groups], temperature, 1 / tau)
            row_gradient(sums[None], x.part(chunk.groups, chunk.rows), scale)
            if y is not None:
                column_sums = add_library_product(column_sums, weights.mT, x.scaled[chunk.groups, chunk.rows])
                if chunk.last:
                    row_gradient(column_sums[None], y.part(chunk.groups, slice(0, y.scaled.shape[1])), scale)
                    column_sums = None
            del weights, sums  # before the next chunk takes its scratch
    return torch.cat(moments).sum() if wants_moment else None
