"""What the contrast kernels share: passes over rows, tiles of cosines, the temperature, and the plan of a launch.

Scaled rows
    u_i = m_i s_i,   s_i = 2^k x_i,   m_i = 2^−k/|x_i|, k such that ½ ≤ m_i < 1
    r_i = 1/|x_i|, and 0 where |x_i| ≤ 1e-12;      dx_i = r_i (du_i − u_i (u_i·du_i))

    Products read the scaled rows s, not the unit rows u. Scaling by a power of two rounds nothing, so the cosines
    c_ij = m_i m_j (s_i·s_j) of bfloat16 rows are as exact as their float32 sum. Rounding a unit row would change each
    element by up to 2⁻⁸ of it, and the temperature divides that error: at tau = 0.005 and d = 16 logits c_ij / tau
    would err by about 0.1, weights P by a tenth. Beside s only r is stored; m is its mantissa. For TF32 products x is
    rounded first, so s, m and r are those of the rounded row. Of rows beyond 8e37 r would be subnormal and lose its
    mantissa: there 2^200 r is stored, which no other row has (`times_inverse`).

    A raw matrix may have any strides between its rows and groups; features are adjacent. Scaled rows are contiguous,
    with zeros up to D, the next multiple of 16 bytes: rows of any length are loaded as whole vectors. The row passes
    are memory bound.

Feature axis
    Up to `WHOLE` features a block holds its rows whole. Beyond, the forward sums its products over slices of BLOCK_D
    features, and the backward stores the weights of a chunk of rows (`contrast_chunked`). Exact float32 is always
    chunked, in both passes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    block_of,
    cdiv,
    device_of,
    dot,
    load_rows,
    load_tile,
    operand,
    precision,
    round_to,
    rounded_product,
    scratch_bytes,
    store_rows,
)
from anomem.kernels.rows import L2_EPS, rows_per_block, shrinking_factor
from anomem.kernels.tile_table import Entry, fitting, kind_of

# Down to this temperature 2/tau · log2(e) ≤ 126: exp((c − 1) / tau) cannot underflow in float32, so the constant 1/tau
# can replace the running maximum.
LOWEST_FIXED_SHIFT = 0.023
# The smallest normal number of float16, 2⁻¹⁴, is 2⁻²⁷ of it, and the sum of two weights at a positive stays below the
# largest, 65504.
FLOAT16_PEAK = tl.constexpr(8192.0)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# What r is multiplied by where it would be subnormal, in two steps that stay in float32, and where that is known by.
RAISE, RAISED = tl.constexpr(2.0**100), tl.constexpr(2.0**60)
# A backward tile of 256 features would be the gradient alone in half of the registers.
WHOLE = {
    "contrast_forward": {"half": 256, "tf32": 128},
    "contrast_backward": {"half": 128, "tf32": 64},
}
SLICE = {"half": 64, "tf32": 32}


@triton.jit
def mantissa(r):
    """m, ½ ≤ m < 1, of r = 2^k m [BLOCK] float32; ½ for r = 0 (a zero row)."""
    bits = r.to(tl.int32, bitcast=True)
    return ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(r):
    """2^k of r = 2^k m [BLOCK] float32; r itself where it is 0 or NaN."""
    bits = r.to(tl.int32, bitcast=True)
    return tl.where(r > 0, ((bits & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True), r)


@triton.jit
def times_inverse(x, r):
    """x r [BLOCK_R, BLOCK_D] with r [BLOCK_R] as stored."""
    raised = r > RAISED
    lower = tl.where(raised, 1.0 / RAISE, 1.0)
    return x * (r * lower)[:, None] * lower[:, None]


@triton.jit
def load_mantissa(inverse, rows, count):
    """m [BLOCK] of these rows from their r."""
    return mantissa(tl.load(inverse + rows, mask=rows < count, other=0.0))


@triton.jit
def scale_tile(
    x,  # [G, count, d]
    x_group_stride,
    x_row_stride,
    scaled,  # [G, count, D], rows contiguous; groups may lie further apart, if `scaled` is one half of joined views
    scaled_group_stride,
    inverse,  # [G, count] float32
    inverse_group_stride,
    group,
    tile,
    count,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store s and r of one tile of rows of one matrix."""
    if ALIGNED:
        x_group_stride = tl.multiple_of(x_group_stride, 16)
        scaled_group_stride = tl.multiple_of(scaled_group_stride, 16)
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    raw = load_rows(x + group * x_group_stride, rows, x_row_stride, count, FEATURES, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    raw = operand(raw.to(tl.float32), tl.float32, PRECISION)
    shrink = shrinking_factor(raw)  # [BLOCK_R]
    shrunk = raw * shrink[:, None]
    length = tl.sqrt_rn(tl.sum(shrunk * shrunk, axis=1))  # [BLOCK_R]
    # A NaN length is not ≤ and stays NaN. An infinite length has factor 0, and an infinite element times 0 is NaN.
    factor = tl.where(length <= L2_EPS, 0.0, tl.div_rn(1.0, length))  # of the shrunk row
    s = shrunk * power_of_two(factor)[:, None]  # [BLOCK_R, BLOCK_D]
    subnormal = (factor > 0.0) & (factor * shrink < SMALLEST_NORMAL)
    factor = tl.where(subnormal, factor * RAISE * (shrink * RAISE), factor * shrink)
    store_rows(scaled + group * scaled_group_stride, s, rows, WIDTH, count, WIDTH, BLOCK_D)
    tl.store(inverse + group * inverse_group_stride + rows, factor, mask=rows < count)


@triton.jit(
    do_not_specialize=[
        "first_group_stride",
        "second_group_stride",
        "first_scaled_group_stride",
        "second_scaled_group_stride",
        "first_inverse_group_stride",
        "second_inverse_group_stride",
        "first_count",
        "second_count",
    ]
)
def contrast_scaled_rows_kernel(
    first,  # [G, first_count, d]
    first_scaled,  # [G, first_count, D]
    first_inverse,
    second,  # [G, second_count, d]
    second_scaled,  # [G, second_count, D]
    second_inverse,
    first_group_stride,
    first_row_stride,
    second_group_stride,
    second_row_stride,
    first_scaled_group_stride,
    second_scaled_group_stride,
    first_inverse_group_stride,
    second_inverse_group_stride,
    first_count,
    second_count,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scaled rows and 1/|row| of two matrices in one launch: the two views, or the rows and the columns.

    ALIGNED: every stride but those of 1/|row| is a multiple of 16, so that loads are vectors. Triton itself would
    compile anew for each stride that is one and each that is not, and some of them follow the number of rows.
    """
    first_tiles = tl.cdiv(first_count, BLOCK_R)
    tiles = first_tiles + tl.cdiv(second_count, BLOCK_R)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tile < first_tiles:
        scale_tile(
            first, first_group_stride, first_row_stride,
            first_scaled, first_scaled_group_stride, first_inverse, first_inverse_group_stride,
            group, tile, first_count, FEATURES, WIDTH, PRECISION, ALIGNED, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    else:
        scale_tile(
            second, second_group_stride, second_row_stride,
            second_scaled, second_scaled_group_stride, second_inverse, second_inverse_group_stride,
            group, tile - first_tiles, second_count, FEATURES, WIDTH, PRECISION, ALIGNED, BLOCK_R, BLOCK_D,
        )  # fmt: skip


@triton.jit
def store_row_gradient(
    du,  # [BLOCK_R, BLOCK_D] float32
    u,  # [BLOCK_R, BLOCK_D] float32
    factor,  # [BLOCK_R] float32, 1/|row| as stored
    first,  # [G, border, d]: gradient of the rows before `border`
    second,  # [G, count − border, d]: of the rows from `border` on; None where border = count
    group,
    rows,
    count,
    border,
    FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Apply the backward of the row normalisation and store it as the raw rows lie. A zero row gets zero."""
    projection = tl.sum(u * du, axis=1)  # [BLOCK_R]
    dx = times_inverse(du - u * projection[:, None], factor)  # [BLOCK_R, BLOCK_D]
    # A row that was set to zero at |x| ≤ 1e-12 gets zero, even if another row made its du NaN.
    dx = tl.where((tl.sum(u * u, axis=1) == 0)[:, None], 0.0, dx)
    dx = round_to(dx, first.dtype.element_ty)
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (columns < FEATURES)[None, :]
    at = (group * border + rows)[:, None] * FEATURES + columns[None, :]
    tl.store(first + at, dx, mask=(rows < border)[:, None] & inside)
    if second is not None:
        at = (group * (count - border) + rows - border)[:, None] * FEATURES + columns[None, :]
        tl.store(second + at, dx, mask=((rows >= border) & (rows < count))[:, None] & inside)


@triton.jit(do_not_specialize=["groups", "count", "border", "splits"])
def contrast_row_gradient_kernel(
    partial,  # [splits, G, count, D] float32
    scaled,  # [G, count, D]
    inverse,  # [G, count] float32, 1/|row|
    peak,  # [G] float32, or None: see `amplification`
    temperature,  # 0-dim float32, or None
    first,
    second,
    inverse_tau,
    groups,
    count,
    border,
    splits,
    SUMS_OF_WEIGHTS: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the partial sums of du in the order of the splits and apply the backward of the row normalisation.

    SUMS_OF_WEIGHTS: the sums are Σ_j W'_ij s_j of `contrast_chunked`, of which du is 1/(tau m_i).
    """
    tiles = tl.cdiv(count, BLOCK_R)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    du = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for split in range(splits):
        base = partial + (tl.full((), split, tl.int64) * groups + group) * count * WIDTH
        du += load_rows(base, rows, WIDTH, count, WIDTH, BLOCK_D)
    s = load_rows(scaled + group * count * WIDTH, rows, WIDTH, count, WIDTH, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    factor = tl.load(inverse + group * count + rows, mask=rows < count, other=0.0)
    m = mantissa(factor)
    if SUMS_OF_WEIGHTS:
        scale = inverse_temperature(inverse_tau, temperature) / amplification(peak, group)
        du = du * (scale / m)[:, None]
    u = s.to(tl.float32) * m[:, None]
    store_row_gradient(du, u, factor, first, second, group, rows, count, border, FEATURES, BLOCK_D)


@triton.jit
def amplification(peak, group):
    """What float16 weights are multiplied by: then the largest upstream gradient of their group is FLOAT16_PEAK.

    peak: [G] float32, max |upstream|; None for other dtypes, which need none.
    """
    amplify = 1.0
    if peak is not None:
        largest = tl.load(peak + group)
        amplify = tl.where((largest > 0) & (largest < float("inf")), FLOAT16_PEAK / largest, 1.0)
    return amplify


@triton.jit
def inverse_temperature(inverse_tau, temperature):
    """1/tau: the number, or loaded from the 0-dim tensor of a learned temperature."""
    if temperature is not None:
        return 1.0 / tl.load(temperature)
    return inverse_tau


@triton.jit
def sliced_product(
    x,  # [x_count, FEATURES]
    y,  # [y_count, FEATURES]
    x_first,
    y_first,
    x_count,
    y_count,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x yᵀ [BLOCK_X, BLOCK_Y] float32, summed over slices of BLOCK_D features."""
    product = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for begin in range(0, FEATURES, BLOCK_D):
        x_slice = load_tile(x, x_first, x_count, begin, FEATURES, BLOCK_X, BLOCK_D)  # [BLOCK_X, BLOCK_D]
        y_slice = load_tile(y, y_first, y_count, begin, FEATURES, BLOCK_Y, BLOCK_D)  # [BLOCK_Y, BLOCK_D]
        product = dot(x_slice, tl.trans(y_slice), product, PRECISION)
    return product


@triton.jit
def cosines(product, x_factor, y_factor):
    """c [BLOCK_X, BLOCK_Y] from products [BLOCK_X, BLOCK_Y] and the rows' factors m, [BLOCK_X] and [BLOCK_Y].

    Its bits depend neither on which of the two rows is x nor on the operations that follow. So where one column has all
    the weight, its cosine minus the maximum and its logit minus lse are exactly 0, and no rounding error is divided by
    tau.
    """
    return rounded_product(product, x_factor[:, None] * y_factor[None, :])


@triton.jit
def opposite(rows, count):
    """Index of each row's positive among the rows of two joined views: i + B for the first, i − B for the second."""
    half = count // 2
    return tl.where(rows < half, rows + half, rows - half)


@triton.jit
def is_special(x_begin, y_begin, count, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """Whether a tile of two joined views has a diagonal element, a positive or padding; most tiles have neither."""
    half = count // 2
    diagonal = (y_begin < x_begin + BLOCK_X) & (x_begin < y_begin + BLOCK_Y)
    above = (y_begin < x_begin + half + BLOCK_X) & (x_begin + half < y_begin + BLOCK_Y)
    below = (y_begin + half < x_begin + BLOCK_X) & (x_begin < y_begin + half + BLOCK_Y)
    return diagonal | above | below | (y_begin + BLOCK_Y > count)


@triton.jit
def load_index(index, rows, count):
    """[BLOCK] int32 column index per row, −1 beyond the last row; an index beyond int32 stays out of range."""
    value = tl.load(index + rows, mask=rows < count, other=-1)
    return tl.minimum(tl.maximum(value, -1), 0x7FFFFFFF).to(tl.int32)


def whole_vectors(features: int, dtype: torch.dtype) -> int:
    """D, the length of scaled rows: features up to the next 16 bytes."""
    step = 16 // dtype.itemsize
    return cdiv(features, step) * step


def scaled_rows(
    first: Tensor,
    first_scaled: Tensor,
    first_inverse: Tensor,
    second: Tensor,
    second_scaled: Tensor,
    second_inverse: Tensor,
) -> None:
    """Scale the rows of two matrices in one launch.

    Args:
        first: [G, R, d], features adjacent.
        first_scaled: [G, R, D], written: s; each group contiguous.
        first_inverse: [G, R] float32, written: 1/|row|.
        second: [G, C, d], features adjacent.
        second_scaled: [G, C, D], written.
        second_inverse: [G, C], written.
    """
    groups, rows, features = first.shape
    columns = second.shape[1]
    block_r = rows_per_block(features)
    tiles = groups * (cdiv(rows, block_r) + cdiv(columns, block_r))
    if tiles == 0:
        return
    strides = (first.stride(0), first.stride(1), second.stride(0), second.stride(1))
    scaled_strides = (first_scaled.stride(0), second_scaled.stride(0))
    aligned = all(stride % 16 == 0 for stride in (*strides, *scaled_strides))
    with device_of(first):
        launch_kernel(contrast_scaled_rows_kernel, (tiles,),
            first, first_scaled, first_inverse, second, second_scaled, second_inverse,
            *strides, *scaled_strides, first_inverse.stride(0), second_inverse.stride(0),
            rows, columns,
            FEATURES=features, WIDTH=first_scaled.shape[2], PRECISION=precision(first.dtype), ALIGNED=aligned,
            BLOCK_R=block_r, BLOCK_D=block_of(features), num_warps=4,
        )  # fmt: skip


class Inputs(NamedTuple):
    """The rows of one side of a contrast, and where their gradients go."""

    scaled: Tensor
    """[G, count, D], contiguous."""
    inverse: Tensor
    """[G, count] float32, 1/|row|."""
    gradients: tuple[Tensor, ...]
    """[G, count, d], or those of two joined views, [G, count / 2, d] each; contiguous."""

    def part(self, groups: slice, rows: slice) -> "Inputs":
        """Some rows, of all groups or of one: each tensor is a pointer and numbers of rows, which may be 0."""
        border = self.gradients[0].shape[1]
        first = self.gradients[0][groups, min(rows.start, border) : min(rows.stop, border)]
        rest = slice(max(rows.start - border, 0), max(rows.stop - border, 0))
        halves = (first, *(second[groups, rest] for second in self.gradients[1:]))
        return Inputs(self.scaled[groups, rows], self.inverse[groups, rows], halves)


Scale = tuple[Tensor | None, Tensor | None, float]
"""(peak, temperature, 1/tau), what sums of weights are to be multiplied by; see `contrast_row_gradient_kernel`."""


def row_gradient(partial: Tensor, rows: Inputs, scale: Scale | None = None) -> None:
    """The gradient of raw rows from its partial sums.

    Args:
        partial: [splits, G, count, D] float32, contiguous.
        rows: whose gradients are written.
        scale: of sums of weights; None for sums of du.
    """
    groups, count, width = rows.scaled.shape
    block_r = rows_per_block(width)
    peak, temperature, inverse_tau = scale or (None, None, 1.0)
    first, second = (*rows.gradients, None)[:2]
    with device_of(rows.scaled):
        launch_kernel(contrast_row_gradient_kernel, (groups * cdiv(count, block_r),),
            partial, rows.scaled, rows.inverse, peak, temperature, first, second, inverse_tau,
            groups, count, first.shape[1], partial.shape[0], SUMS_OF_WEIGHTS=scale is not None,
            FEATURES=first.shape[2], WIDTH=width, BLOCK_R=block_r, BLOCK_D=block_of(width), num_warps=4,
        )  # fmt: skip


def has_fixed_shift(rows: Tensor, temperature: Tensor | None, tau: float) -> bool:
    """Whether exponentials need no running maximum.

    A learned temperature is not known before the launch. Exact float32 keeps the maximum: exponents of up to 126 cost
    7 of its 24 bits, more than plain PyTorch loses, and its exponentials take little of the time.
    """
    exact = rows.dtype == torch.float32 and precision(rows.dtype) == "ieee"
    return temperature is None and tau >= LOWEST_FIXED_SHIFT and not exact


class Chunk(NamedTuple):
    """Some groups and some of their rows."""

    groups: slice
    rows: slice
    last: bool
    """Of these groups."""


def chunks(x: Tensor, columns: int) -> Iterator[Chunk]:
    """Chunks in order whose scores take about SCRATCH_BYTES: several groups, or a part of one.

    Args:
        x: [G, R, d]; scores have its dtype, those of exact float32 too.
        columns: C.
    """
    groups, rows, _ = x.shape
    row_bytes = max(columns, 1) * x.dtype.itemsize
    limit = scratch_bytes(x.device)
    if groups > 0 and rows * row_bytes <= limit:
        step = max(1, limit // max(rows * row_bytes, 1))
        for first in range(0, groups, step):
            yield Chunk(slice(first, min(first + step, groups)), slice(0, rows), True)
        return
    step = max(1, limit // row_bytes // 128) * 128
    for group in range(groups):
        for first in range(0, rows, step):
            yield Chunk(slice(group, group + 1), slice(first, min(first + step, rows)), first + step >= rows)


class Plan(NamedTuple):
    """How a launch with a tile of the table cuts up the features; the same for every tile."""

    entry: Entry
    """Of the tile table."""
    block_d: int
    """BLOCK_D of the products."""
    sliced: bool
    """Whether products are summed over slices of BLOCK_D features."""
    precision: str


def plan(kernel: str, owned: Tensor) -> Plan | None:
    """Cut up the features of the rows that the blocks own; None where the library multiplies.

    Args:
        kernel: "contrast_forward" or "contrast_backward"; a sliced plan of the latter is one of `contrast_chunked`.
        owned: [G, X, d].

    Raises:
        RuntimeError: no tile of the table fits the GPU.
    """
    features = owned.shape[2]
    reason = obstacle(kernel, owned.dtype, features, owned.device)
    if reason is not None:
        raise RuntimeError(reason)
    return _cut(kernel, owned.dtype, features)


def obstacle(kernel: str, dtype: torch.dtype, features: int, device: torch.device) -> str | None:
    """Why no tile of the table runs a kernel on a device, or None.

    Args:
        kernel: as in `plan`.
        dtype: of the rows.
        features: d, their length.
        device: of the rows.
    """
    cut = _cut(kernel, dtype, features)
    if cut is None or fitting(cut.entry, device):
        return None
    dtype_name = str(dtype).removeprefix("torch.")
    return f"no tile of {kernel} for {dtype_name} rows of {features} features fits the shared memory of this GPU"


def _cut(kernel: str, dtype: torch.dtype, features: int) -> Plan | None:
    arithmetic = precision(dtype)
    kind = kind_of(dtype, arithmetic)
    if kind == "ieee":
        return None
    whole = WHOLE[kernel][kind]
    if features <= whole:
        block_d = block_of(features)
        return Plan((kernel, kind, max(block_d, 64)), block_d, False, arithmetic)
    entry = (
        (kernel, kind, 2 * whole) if kernel == "contrast_forward" else ("contrast_chunked_weights", kind, SLICE[kind])
    )
    return Plan(entry, SLICE[kind], True, arithmetic)
