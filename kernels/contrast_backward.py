"""Gradients of a contrast with respect to its raw rows, columns and temperature; deterministic, without atomics.

With cosines c_ij = u_i·v_j, P_ij = exp(c_ij / tau − lse_i), δ_ij = 1 at the positive of row i, and upstream gradient
g_i of the loss of row i,

    du_i = (1/tau) Σ_j W_ij v_j,   dv_j = (1/tau) Σ_i W_ij u_i,   W_ij = g_i (P_ij − δ_ij),

where 1 − P of the positive comes from the loss −log P_ij: where the positive dominates its row, P − 1 would be the
difference of nearly equal numbers.

For two joined views c and δ are symmetric, and one pass is enough:

    du_i = (1/tau) Σ_j W_ij u_j,   W_ij = g_i P_ij + g_j P_ji − (g_i + g_j) δ_ij,   W_ii = 0.

The temperature's gradient comes with it: dtau = −(1/tau) Σ_ij W_ij c_ij / tau, half of that for joined views.

Each block owns BLOCK_X rows x of one matrix and streams tiles of BLOCK_Y rows y of the other: W = [BLOCK_X, BLOCK_Y],
du += W y, as in the backward of FlashAttention (Dao 2023). A block that holds its gradient whole also applies the
backward of the row normalisation. If the sum is cut into splits, it stores float32 partial sums, which
`contrast_row_gradient_kernel` adds. Longer rows and exact float32: `contrast_chunked`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.contrast_rows import (
    Inputs,
    Plan,
    amplification,
    cosines,
    has_fixed_shift,
    inverse_temperature,
    is_special,
    load_index,
    load_mantissa,
    mantissa,
    opposite,
    row_gradient,
    store_row_gradient,
)
from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    cdiv,
    device_of,
    dot,
    load_tile,
    multiprocessors,
    operand,
    rounded_product,
    split_loop,
)
from anomem.kernels.tile_search import Launched, Site, launch
from anomem.kernels.tile_table import Tile, architecture_of

# The matrix W of a launch: of two joined views, or a rectangle whose blocks own rows or columns.
JOINED, ROWS, COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_per_row(lse, upstream, rows, count):
    """(lse, upstream gradient), [BLOCK] each; a row beyond the last gets weight 0."""
    mask = rows < count
    return tl.load(lse + rows, mask=mask, other=float("inf")), tl.load(upstream + rows, mask=mask, other=0.0)


@triton.jit
def load_missing(loss, rows, count):
    """1 − P of the positive = 1 − exp(−loss) [BLOCK], exact where P is close to 1."""
    x = tl.load(loss + rows, mask=rows < count, other=0.0)
    series = x * (1.0 - x / 2.0 * (1.0 - x / 3.0 * (1.0 - x / 4.0 * (1.0 - x / 5.0 * (1.0 - x / 6.0)))))
    return tl.where(x < 0.125, series, 1.0 - tl.exp(-x))


@triton.jit
def joined_weights(logit, x_lse, x_upstream, x_weight, y_lse, y_upstream, FIXED: tl.constexpr):
    """g_i P_ij + g_j P_ji [BLOCK_X, BLOCK_Y]; x_weight: exp(−lse) g [BLOCK_X], used where FIXED."""
    if FIXED:
        # One exponential an element. With 1/tau ≤ 44 both exp(c / tau) and exp(−lse) stay within 2^±82. So no shift is
        # needed, and the product with any upstream gradient stays in float32.
        weight = tl.exp(logit) * (x_weight[:, None] + (tl.exp(-y_lse) * y_upstream)[None, :])
    else:
        weight = tl.exp(logit - x_lse[:, None]) * x_upstream[:, None]
        weight += tl.exp(logit - y_lse[None, :]) * y_upstream[None, :]
    return weight


@triton.jit
def rectangle_weights(logit, lse, upstream, missing, target, hidden, column, column_count):
    """W = g (P − δ). `logit` is [BLOCK_X, BLOCK_Y]; the others are [BLOCK_X, 1] or [1, BLOCK_Y]."""
    outside = column >= column_count
    if hidden is not None:
        outside = outside | (column == hidden)
        missing = tl.where(hidden == target, 1.0, missing)
    weight = tl.where(outside, 0.0, tl.exp(logit - lse) * upstream)
    return tl.where(column == target, -missing * upstream, weight)


@triton.jit(do_not_specialize=["groups", "owned_count", "streamed_count", "border", "splits", "streamed_per_split"])
def contrast_backward_kernel(
    owned,  # [G, X, D], scaled rows
    streamed,  # [G, Y, D], scaled rows
    owned_inverse,  # [G, X] float32, 1/|row|
    streamed_inverse,  # [G, Y] float32
    loss,  # [G, R] float32
    lse,  # [G, R] float32
    upstream,  # [G, R] float32
    positive,  # [R] int64; None if JOINED
    exclude,  # [R] int64, or None
    temperature,  # 0-dim float32, or None
    peak,  # [G] float32: see `amplification`; None but for float16
    first,  # [G, border, d], written if `partial` is None: see `store_row_gradient`
    second,  # [G, X − border, d], or None
    moment,  # [splits, G, X] float32: Σ_j W_ij c_ij / tau, for the temperature's gradient; None if not needed
    partial,  # [splits, G, X, D] float32, or None
    inverse_tau,
    groups,
    owned_count,
    streamed_count,
    border,
    splits,
    streamed_per_split,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROLE: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of owned rows. Grid: [G · splits · tiles]."""
    tiles = tl.cdiv(owned_count, BLOCK_X)
    tile = tl.program_id(0) % tiles
    split = (tl.program_id(0) // tiles) % splits
    group = (tl.program_id(0) // tiles // splits).to(tl.int64)
    x = owned + group * owned_count * WIDTH
    y = streamed + group * streamed_count * WIDTH
    row_count = streamed_count if ROLE == COLUMNS else owned_count
    y_inverse = streamed_inverse + group * streamed_count
    group_loss = loss + group * row_count
    group_lse = lse + group * row_count
    group_upstream = upstream + group * row_count

    x_rows = tile * BLOCK_X + tl.arange(0, BLOCK_X)  # [BLOCK_X]
    inverse_tau = inverse_temperature(inverse_tau, temperature)
    amplify = amplification(peak, group)
    if ROLE != COLUMNS:
        x_lse, x_upstream = load_per_row(group_lse, group_upstream, x_rows, owned_count)  # [BLOCK_X]
        x_upstream = x_upstream * amplify
    if ROLE == JOINED:
        x_target = opposite(x_rows, owned_count)  # [BLOCK_X]
        x_weight = tl.exp(-x_lse) * x_upstream  # [BLOCK_X], used where FIXED
    if ROLE == ROWS:
        x_target = load_index(positive, x_rows, owned_count)
        x_missing = load_missing(group_loss, x_rows, owned_count)  # [BLOCK_X]
        x_hidden = None
        if exclude is not None:
            x_hidden = load_index(exclude, x_rows, owned_count)[:, None]
    r = tl.load(owned_inverse + group * owned_count + x_rows, mask=x_rows < owned_count, other=0.0)  # [BLOCK_X]
    x_factor = mantissa(r)
    x_tile = load_tile(x, tile * BLOCK_X, owned_count, 0, WIDTH, BLOCK_X, BLOCK_D)  # [BLOCK_X, BLOCK_D]

    du = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    x_moment = tl.zeros((BLOCK_X,), tl.float32)
    begin = split * streamed_per_split
    end = tl.minimum(begin + streamed_per_split, streamed_count)
    for start in range(begin, end, BLOCK_Y):
        y_rows = start + tl.arange(0, BLOCK_Y)  # [BLOCK_Y]
        y_tile = load_tile(y, start, streamed_count, 0, WIDTH, BLOCK_Y, BLOCK_D)  # [BLOCK_Y, BLOCK_D]
        product = dot(x_tile, tl.trans(y_tile), tl.zeros((BLOCK_X, BLOCK_Y), tl.float32), PRECISION)
        y_factor = load_mantissa(y_inverse, y_rows, streamed_count)  # [BLOCK_Y]
        logit = rounded_product(cosines(product, x_factor, y_factor), inverse_tau)  # [BLOCK_X, BLOCK_Y]
        if ROLE != ROWS:
            y_lse, y_upstream = load_per_row(group_lse, group_upstream, y_rows, streamed_count)  # [BLOCK_Y]
            y_upstream = y_upstream * amplify
        if ROLE == JOINED:
            weight = joined_weights(logit, x_lse, x_upstream, x_weight, y_lse, y_upstream, FIXED)
            if is_special(tile * BLOCK_X, start, streamed_count, BLOCK_X, BLOCK_Y):
                x_pull = x_upstream * load_missing(group_loss, x_rows, owned_count)  # [BLOCK_X]
                y_pull = y_upstream * load_missing(group_loss, y_rows, streamed_count)  # [BLOCK_Y]
                is_positive = y_rows[None, :] == x_target[:, None]
                weight = tl.where(is_positive, -x_pull[:, None] - y_pull[None, :], weight)
                outside = (y_rows[None, :] == x_rows[:, None]) | (y_rows >= streamed_count)[None, :]
                weight = tl.where(outside, 0.0, weight)
        elif ROLE == ROWS:
            weight = rectangle_weights(
                logit, x_lse[:, None], x_upstream[:, None], x_missing[:, None], x_target[:, None], x_hidden,
                y_rows[None, :], streamed_count,
            )  # fmt: skip
        else:
            y_target = load_index(positive, y_rows, streamed_count)
            y_hidden = None
            if exclude is not None:
                y_hidden = load_index(exclude, y_rows, streamed_count)[None, :]
            y_missing = load_missing(group_loss, y_rows, streamed_count)  # [BLOCK_Y]
            weight = rectangle_weights(
                logit, y_lse[None, :], y_upstream[None, :], y_missing[None, :], y_target[None, :], y_hidden,
                x_rows[:, None], owned_count,
            )  # fmt: skip
        if moment is not None:
            x_moment += tl.sum(weight * logit, axis=1)
        du = dot(operand(weight * y_factor[None, :], y_tile.dtype, PRECISION), y_tile, du, PRECISION)
    du = du * (inverse_tau / amplify)

    part = tl.full((), split, tl.int64) * groups + group
    if moment is not None:
        at = part * owned_count + x_rows
        tl.store(moment + at, x_moment / amplify, mask=x_rows < owned_count)
    if partial is None:
        s = load_tile(x, tile * BLOCK_X, owned_count, 0, WIDTH, BLOCK_X, BLOCK_D)  # [BLOCK_X, BLOCK_D]
        u = s.to(tl.float32) * x_factor[:, None]
        store_row_gradient(du, u, r, first, second, group, x_rows, owned_count, border, FEATURES, BLOCK_D)
    else:
        mask = (x_rows < owned_count)[:, None] & (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
        at = (part * owned_count + x_rows)[:, None] * WIDTH + tl.arange(0, BLOCK_D)[None, :]
        tl.store(partial + at, du, mask=mask)


def gradient(
    role: tl.constexpr,
    owned: Inputs,
    streamed: Inputs,
    loss: Tensor,
    lse: Tensor,
    upstream: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    wants_moment: bool,
    cut: Plan,
) -> Tensor | None:
    """Write the gradient of the raw rows behind `owned`; arguments as in `contrast_backward_kernel`.

    Args:
        cut: not sliced.

    Returns:
        Σ_ij W_ij c_ij / tau over all groups, 0-dim float32, if `wants_moment`. Its order of summation is fixed.
    """
    rows, others = owned.scaled, streamed.scaled
    groups, owned_count, width = rows.shape
    if rows.numel() == 0 or others.numel() == 0:
        for result in owned.gradients:
            result.zero_()
        return lse.new_zeros(()) if wants_moment else None
    peak = torch.linalg.vector_norm(upstream, torch.inf, dim=1) if rows.dtype == torch.float16 else None
    fixed = role == JOINED and has_fixed_shift(rows, temperature, tau)
    first, second = (*owned.gradients, None)[:2]
    # Gradients of such rows are stored one number at a time. With three stages Triton 3.6 then spills in the loop.
    two_stages = first.shape[2] % 8 > 0 and architecture_of(rows.device) == 90

    def run(tile: Tile) -> Launched:
        tile = tile._replace(stages=min(tile.stages, 2)) if two_stages else tile
        blocks = groups * cdiv(owned_count, tile.rows)
        parts, streamed_per_part = split_loop(others.shape[1], tile.columns, blocks, multiprocessors(rows))
        partial = None if parts == 1 else rows.new_empty(parts, *rows.shape, dtype=torch.float32)
        moment = lse.new_empty(parts, groups, owned_count) if wants_moment else None
        compiled = launch_kernel(contrast_backward_kernel, (blocks * parts,),
            rows, others, owned.inverse, streamed.inverse, loss, lse, upstream, positive, exclude, temperature, peak,
            first, second, moment, partial, 1 / tau, groups, owned_count, others.shape[1], first.shape[1],
            parts, streamed_per_part, FEATURES=first.shape[2], WIDTH=width,
            ROLE=role.value, FIXED=fixed, PRECISION=cut.precision,
            BLOCK_X=tile.rows, BLOCK_Y=tile.columns, BLOCK_D=cut.block_d, **tile.options,
        )  # fmt: skip
        if partial is not None:
            row_gradient(partial, owned)
        return Launched(compiled, moment)

    facts = {"dtype": rows.dtype, "d": width, "role": role.value, "exclude": exclude is not None}
    facts |= {"learned": temperature is not None, "fixed": fixed, "moment": wants_moment}
    with device_of(rows):
        moment = launch(Site(cut.entry, facts, groups * owned_count, others.shape[1], rows.device), run)
    return None if moment is None else moment.sum()
