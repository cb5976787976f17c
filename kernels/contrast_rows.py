"""The row passes of the contrastive losses: scaled rows in, gradients of the raw rows out. Both are memory bound.

    u_i = m_i s_i,   s_i = 2^k x_i,   m_i = 2^−k/|x_i|, k such that ½ ≤ m_i < 1
    r_i = 1/|x_i|, and 0 where |x_i| ≤ 1e-12;      dx_i = r_i (du_i − u_i (u_i·du_i))

What the products read are the scaled rows s, not the unit rows u. A power of two rounds nothing, so that the cosines
u_i·u_j = m_i m_j (s_i·s_j) of bfloat16 rows are as exact as their float32 sum. Rounding a unit row would change
each element by up to 2⁻⁸ of it, and the temperature divides that: at tau = 0.005 and d = 16 logits would err by about
0.1, weights P by a tenth. Only r is stored beside s: m is its mantissa.

A raw matrix may have any strides between its rows and groups; features are adjacent. Scaled rows are contiguous.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.common import block_of, cdiv, device_of, load_rows, round_to, store_rows
from anomem.kernels.normalize import L2_EPS
from anomem.kernels.specs import Spec, spec
from anomem.kernels.tiles import Tile


@triton.jit
def mantissa(r):
    """m, ½ ≤ m < 1, of r = 2^k m [BLOCK] float32; ½ for 0, whose row is 0."""
    bits = r.to(tl.int32, bitcast=True)
    return ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(r):
    """2^k of r = 2^k m [BLOCK] float32; r itself where it is 0 or NaN."""
    bits = r.to(tl.int32, bitcast=True)
    return tl.where(r > 0, ((bits & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True), r)


@triton.jit
def load_mantissa(inverse, rows, count):
    """m [BLOCK] of these rows from their r."""
    return mantissa(tl.load(inverse + rows, mask=rows < count, other=0.0))


@triton.jit
def _scale_tile(
    x,  # [G, count, d]
    x_group_stride,
    x_row_stride,
    scaled,  # [G, count, d], rows contiguous; the groups may lie further apart, where `x` is one part of a matrix
    scaled_group_stride,
    inverse,  # [G, count] float32
    inverse_group_stride,
    group,
    tile,
    count,
    FEATURES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    raw = load_rows(x + group * x_group_stride, rows, x_row_stride, count, FEATURES, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    raw = raw.to(tl.float32)
    length = tl.sqrt_rn(tl.sum(raw * raw, axis=1))  # [BLOCK_R]
    # Not NaN where the length is; 0 also where it overflowed, and then infinite elements times 0 give NaN.
    factor = tl.where(length <= L2_EPS, 0.0, tl.div_rn(1.0, length))
    s = raw * power_of_two(factor)[:, None]  # [BLOCK_R, BLOCK_D]
    store_rows(scaled + group * scaled_group_stride, s, rows, FEATURES, count, FEATURES, BLOCK_D)
    tl.store(inverse + group * inverse_group_stride + rows, factor, mask=rows < count)


@triton.jit
def scaled_rows_kernel(
    first,  # [G, first_count, d]
    first_scaled,
    first_inverse,
    second,  # [G, second_count, d]
    second_scaled,
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
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scaled rows and 1/|row| of two matrices in one launch: the two views, or the rows and the columns."""
    first_tiles = tl.cdiv(first_count, BLOCK_R)
    tiles = first_tiles + tl.cdiv(second_count, BLOCK_R)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tile < first_tiles:
        _scale_tile(
            first, first_group_stride, first_row_stride,
            first_scaled, first_scaled_group_stride, first_inverse, first_inverse_group_stride,
            group, tile, first_count, FEATURES, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    else:
        _scale_tile(
            second, second_group_stride, second_row_stride,
            second_scaled, second_scaled_group_stride, second_inverse, second_inverse_group_stride,
            group, tile - first_tiles, second_count, FEATURES, BLOCK_R, BLOCK_D,
        )  # fmt: skip


@triton.jit
def store_row_gradient(
    du,  # [BLOCK_R, BLOCK_D] float32
    u,  # [BLOCK_R, BLOCK_D] float32
    factor,  # [BLOCK_R] float32, 1/|row|
    first,  # [G, border, d]: gradient of the rows before `border`
    second,  # [G, count − border, d]: of the rows from `border` on; None where border = count
    group,
    rows,
    count,
    border,
    FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The backward of the row normalisation, written to where the raw rows came from. A zero row gets zero."""
    along = tl.sum(u * du, axis=1)  # [BLOCK_R]
    dx = (du - u * along[:, None]) * factor[:, None]  # [BLOCK_R, BLOCK_D]
    # du can be NaN, because of another row; a row that was cut off at |x| ≤ 1e-12 gets zero all the same.
    dx = tl.where((tl.sum(u * u, axis=1) == 0)[:, None], 0.0, dx)
    dx = round_to(dx, first.dtype.element_ty)
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (columns < FEATURES)[None, :]
    at = (group * border + rows)[:, None] * FEATURES + columns[None, :]
    tl.store(first + at, dx, mask=(rows < border)[:, None] & inside)
    if second is not None:
        at = (group * (count - border) + rows - border)[:, None] * FEATURES + columns[None, :]
        tl.store(second + at, dx, mask=((rows >= border) & (rows < count))[:, None] & inside)


@triton.jit
def row_gradient_kernel(
    partial,  # [splits, G, count, d] float32
    scaled,  # [G, count, d]
    inverse,  # [G, count] float32, 1/|row|
    first,
    second,
    groups,
    count,
    border,
    splits,
    FEATURES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """du = the partial sums added in the order of the splits, then the backward of the row normalisation."""
    tiles = tl.cdiv(count, BLOCK_R)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    du = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for split in range(splits):
        base = partial + (tl.full((), split, tl.int64) * groups + group) * count * FEATURES
        du += load_rows(base, rows, FEATURES, count, FEATURES, BLOCK_D)
    s = load_rows(scaled + group * count * FEATURES, rows, FEATURES, count, FEATURES, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    factor = tl.load(inverse + group * count + rows, mask=rows < count, other=0.0)
    u = s.to(tl.float32) * mantissa(factor)[:, None]
    store_row_gradient(du, u, factor, first, second, group, rows, count, border, FEATURES, BLOCK_D)


def rows_per_block(features: int) -> int:
    """BLOCK_R of the row passes: about 4096 elements, 32 a thread."""
    return max(4096 // block_of(features), 1)


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
        first_scaled: [G, R, d], written: s; each group contiguous.
        first_inverse: [G, R] float32, written: 1/|row|.
        second: [G, C, d], features adjacent.
        second_scaled: [G, C, d], written.
        second_inverse: [G, C], written.
    """
    groups, rows, features = first.shape
    columns = second.shape[1]
    block_r = rows_per_block(features)
    tiles = groups * (cdiv(rows, block_r) + cdiv(columns, block_r))
    if tiles == 0:
        return
    with device_of(first):
        scaled_rows_kernel[(tiles,)](
            first, first_scaled, first_inverse, second, second_scaled, second_inverse,
            first.stride(0), first.stride(1), second.stride(0), second.stride(1),
            first_scaled.stride(0), second_scaled.stride(0), first_inverse.stride(0), second_inverse.stride(0),
            rows, columns,
            FEATURES=features, BLOCK_R=block_r, BLOCK_D=block_of(features), num_warps=4,
        )  # fmt: skip


def row_gradient(partial: Tensor, scaled: Tensor, inverse: Tensor, first: Tensor, second: Tensor | None) -> None:
    """Finish a gradient that was left in partial sums; arguments as in `row_gradient_kernel`."""
    groups, count, features = scaled.shape
    block_r = rows_per_block(features)
    with device_of(scaled):
        row_gradient_kernel[(groups * cdiv(count, block_r),)](
            partial, scaled, inverse, first, second,
            groups, count, first.shape[1], partial.shape[0],
            FEATURES=features, BLOCK_R=block_r, BLOCK_D=block_of(features), num_warps=4,
        )  # fmt: skip


def specs(architecture: int) -> Iterator[Spec]:
    """The row passes at common and at the longest rows; they multiply no matrices."""
    for features in (128, 1024):
        tile = Tile(rows=rows_per_block(features), columns=features, warps=4, stages=3, shared=1)
        shape = {"FEATURES": features, "BLOCK_R": tile.rows, "BLOCK_D": features}
        parts = ("first", "second")
        arguments = {f"{part}{name}": kind for part in parts for name, kind in _MATRIX.items()}
        yield spec(f"scaled_rows bf16 d{features}", scaled_rows_kernel, arguments, shape, tile, matrix=False)
        arguments = {"partial": "*fp32", "inverse": "*fp32"} | dict.fromkeys(("scaled", *parts), "*bf16")
        arguments |= dict.fromkeys(("groups", "count", "border", "splits"), "i32")
        yield spec(f"row_gradient bf16 d{features}", row_gradient_kernel, arguments, shape, tile, matrix=False)


_MATRIX = {
    "": "*bf16", "_scaled": "*bf16", "_inverse": "*fp32", "_group_stride": "i32", "_row_stride": "i32",
    "_scaled_group_stride": "i32", "_inverse_group_stride": "i32", "_count": "i32",
}  # fmt: skip
