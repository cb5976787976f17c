"""Row normalisation of retrieval: in registers, as passes over a matrix, and the backward's constant of each row.

    layer   y = (x − mean(x)) · r,  r = 1/sqrt(var(x) + 1e-5)     dx = r (dy − mean(dy) − y mean(dy ∘ y))
    l2      y = x · r,              r = 1/|x|, 0 if |x| ≤ 1e-12   dx = r (dy − y Σ(dy ∘ y))

The variance is biased and there is no affine part. NORMALIZE is 0 for none, 1 for layer, 2 for l2. Tiles are
[BLOCK, BLOCK_D] float32 with rows of length D; columns beyond D are zero in the input and in the result.

Each block of a pass holds whole rows, so the passes are memory bound and read every number once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    block_of,
    cdiv,
    device_of,
    load_rows,
    operand,
    store_rows,
)

NONE, LAYER, L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LAYER_EPS = tl.constexpr(1e-5)
L2_EPS = tl.constexpr(1e-12)
LONG = tl.constexpr(2.0**50)  # the squares of 2²⁷ such elements stay in float32


@triton.jit
def shrinking_factor(x):
    """[BLOCK] factors 2^k that keep the squares of rows x [BLOCK, BLOCK_D] from overflowing: 1 but for long rows.

    The exponent of a long row's largest element becomes 20.
    """
    peak = tl.max(tl.abs(x), axis=1)
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = ((274 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(20 − (exponent − 127))
    return tl.where((peak > LONG) & (peak < float("inf")), power, 1.0)


@triton.jit
def normalize_rows(x, NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(y, r): the normalised rows [BLOCK, BLOCK_D] and the factor r [BLOCK] that the backward needs."""
    if NORMALIZE == LAYER:
        shrink = shrinking_factor(x)
        x = x * shrink[:, None]
        mean = tl.sum(x, axis=1) / D
        y = zero_beyond(x - mean[:, None], D, BLOCK_D)
        # Beside the variance of a long row, of 2⁻⁸ and more when shrunk, the constant is nothing.
        factor = 1.0 / tl.sqrt_rn(tl.sum(y * y, axis=1) / D + tl.where(shrink == 1.0, LAYER_EPS, 1e-30))
        y = y * factor[:, None]
        factor = factor * shrink
    elif NORMALIZE == L2:
        shrink = shrinking_factor(x)
        x = x * shrink[:, None]
        length = tl.sqrt_rn(tl.sum(x * x, axis=1))
        factor = tl.where(length <= L2_EPS, 0.0, 1.0 / length)  # a NaN length is not ≤ and stays NaN
        y = x * factor[:, None]
        factor = factor * shrink
    else:
        y = x
        factor = tl.full((x.shape[0],), 1.0, tl.float32)
    return y, factor


@triton.jit
def normalize_rows_backward(dy, y, factor, NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """dx [BLOCK, BLOCK_D] from dy, y [BLOCK, BLOCK_D] and the factor [BLOCK] of `normalize_rows`."""
    if NORMALIZE == LAYER:
        mean = tl.sum(dy, axis=1) / D
        projection = tl.sum(dy * y, axis=1) / D
        dx = zero_beyond(dy - mean[:, None] - y * projection[:, None], D, BLOCK_D) * factor[:, None]
    elif NORMALIZE == L2:
        projection = tl.sum(dy * y, axis=1)
        dx = (dy - y * projection[:, None]) * factor[:, None]
    else:
        dx = dy
    return dx


@triton.jit
def zero_beyond(x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [BLOCK, BLOCK_D] with zeros in the columns beyond D."""
    if D != BLOCK_D:
        x = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], x, 0.0)
    return x


@triton.jit(do_not_specialize=["N"])
def row_normalize_kernel(
    x,  # [N, d]
    y,  # [N, d], contiguous
    N,
    x_stride,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = norm(x), as an operand of products of this PRECISION."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    tile = load_rows(x, rows, x_stride, N, D, BLOCK_D).to(tl.float32)  # [BLOCK, BLOCK_D]
    unit, _ = normalize_rows(tile, NORMALIZE, D, BLOCK_D)
    store_rows(y, operand(unit, tl.float32, PRECISION), rows, D, N, D, BLOCK_D)


@triton.jit(do_not_specialize=["SPLIT", "N"])
def row_normalize_backward_kernel(
    partials,  # [SPLIT, N, d]
    x,  # [N, d]
    dx,  # [N, d], contiguous
    SPLIT,
    N,
    x_stride,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx from the partial sums of dy. Their order is fixed, whatever the order in which they were computed."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    dy = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for part in range(SPLIT):
        dy += load_rows(partials + tl.full((), part, tl.int64) * N * D, rows, D, N, D, BLOCK_D).to(tl.float32)
    tile = load_rows(x, rows, x_stride, N, D, BLOCK_D).to(tl.float32)  # [BLOCK, BLOCK_D]
    unit, factor = normalize_rows(tile, NORMALIZE, D, BLOCK_D)
    store_rows(dx, normalize_rows_backward(dy, unit, factor, NORMALIZE, D, BLOCK_D), rows, D, N, D, BLOCK_D)


@triton.jit(do_not_specialize=["N"])
def row_constant_kernel(
    out,  # [N, d]
    dout,  # [N, d]
    dlse,  # [N] float32, or None
    delta,  # [N] float32
    N,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta_n = Σ_j out_nj dout_nj − dlse_n."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    out_tile = load_rows(out, rows, D, N, D, BLOCK_D).to(tl.float32)  # [BLOCK, BLOCK_D]
    dout_tile = load_rows(dout, rows, D, N, D, BLOCK_D).to(tl.float32)
    constant = tl.sum(out_tile * dout_tile, axis=1)  # [BLOCK]
    if dlse is not None:
        constant -= tl.load(dlse + rows, mask=rows < N, other=0.0)
    tl.store(delta + rows, constant, mask=rows < N)


def normalized(x: Tensor, normalize: int, out: Tensor | None = None, precision: str = "ieee") -> Tensor:
    """norm(x), rounded to x's dtype, or to TF32.

    Args:
        x: [N, d], unit inner stride.
        normalize: 0 none, 1 layer, 2 l2.
        out: [N, d], contiguous, written; a new tensor when None.
        precision: of the products that read the result, "ieee" or "tf32".

    Returns:
        [N, d], contiguous; x itself if it is contiguous, nothing is to be done and `out` is None.
    """
    if normalize == 0 and out is None and precision == "ieee" and x.is_contiguous():
        return x
    out = x.new_empty(x.shape) if out is None else out
    count, width = x.shape
    block = rows_per_block(width)
    with device_of(x):
        launch_kernel(
            row_normalize_kernel,
            (cdiv(count, block),),
            x,
            out,
            count,
            x.stride(0),
            normalize,
            precision,
            width,
            block,
            block_of(width),
        )
    return out


def normalized_backward(partials: Tensor, x: Tensor, normalize: int, dx: Tensor) -> None:
    """dx = (d norm(x)/dx)ᵀ Σ_s partials[s], summed in the order of s.

    Args:
        partials: [SPLIT, N, d], contiguous.
        x: [N, d], unit inner stride.
        normalize: 0 none, 1 layer, 2 l2.
        dx: [N, d], contiguous, written.
    """
    split, count, width = partials.shape
    block = rows_per_block(width)
    with device_of(x):
        launch_kernel(
            row_normalize_backward_kernel,
            (cdiv(count, block),),
            partials,
            x,
            dx,
            split,
            count,
            x.stride(0),
            normalize,
            width,
            block,
            block_of(width),
        )


def row_constant(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """Σ_j out_nj dout_nj − dlse_n, which the backward of a softmax subtracts in every row.

    Args:
        out: [N, dv], contiguous.
        dout: [N, dv], contiguous.
        dlse: [N] or None.

    Returns:
        [N] float32.
    """
    count, width = out.shape
    delta = out.new_empty(count, dtype=torch.float32)
    block = rows_per_block(width)
    with device_of(out):
        launch_kernel(
            row_constant_kernel, (cdiv(count, block),), out, dout, dlse, delta, count, width, block, block_of(width)
        )
    return delta


@functools.cache
def rows_per_block(width: int) -> int:
    """Rows that a block of a row pass holds: about 4096 numbers, 32 a thread, and at least one row."""
    return max(1, 4096 // block_of(width))
