"""Passes over the rows of a matrix: normalisation, its backward over partial sums, and the backward's row constant.

Each block holds whole rows, so these are memory bound and read every number once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.common import block_of, cdiv, device_of, load_rows, store_rows
from anomem.kernels.normalize import normalize_rows, normalize_rows_backward
from anomem.kernels.specs import Spec, spec
from anomem.kernels.tiles import Tile


@triton.jit
def _normalize(x, y, N, x_stride, NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = load_rows(x, rows, x_stride, N, D, BLOCK_D).to(tl.float32)  # [BLOCK, BLOCK_D]
    unit, _ = normalize_rows(tile, NORMALIZE, D, BLOCK_D)
    store_rows(y, unit, rows, D, N, D, BLOCK_D)


@triton.jit
def _normalize_backward(
    partials, x, dx, SPLIT, N, x_stride,
    NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for part in range(SPLIT):  # in this order whatever the order in which the parts were made
        dy += load_rows(partials + tl.full((), part, tl.int64) * N * D, rows, D, N, D, BLOCK_D).to(tl.float32)
    tile = load_rows(x, rows, x_stride, N, D, BLOCK_D).to(tl.float32)  # [BLOCK, BLOCK_D]
    unit, factor = normalize_rows(tile, NORMALIZE, D, BLOCK_D)
    store_rows(dx, normalize_rows_backward(dy, unit, factor, NORMALIZE, D, BLOCK_D), rows, D, N, D, BLOCK_D)


@triton.jit
def _row_constant(out, dout, dlse, delta, N, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = load_rows(out, rows, D, N, D, BLOCK_D).to(tl.float32)  # [BLOCK, BLOCK_D]
    do = load_rows(dout, rows, D, N, D, BLOCK_D).to(tl.float32)
    constant = tl.sum(o * do, axis=1)  # [BLOCK]
    if dlse is not None:
        constant -= tl.load(dlse + rows, mask=rows < N, other=0.0)
    tl.store(delta + rows, constant, mask=rows < N)


def normalized(x: Tensor, normalize: int, out: Tensor | None = None) -> Tensor:
    """norm(x), rounded to x's dtype.

    Args:
        x: [N, d], unit inner stride.
        normalize: 0 none, 1 layer, 2 l2.
        out: [N, d], contiguous, to be written; a new tensor when None.

    Returns:
        [N, d], contiguous; x itself where there is nothing to do.
    """
    if normalize == 0 and out is None and x.is_contiguous():
        return x
    out = x.new_empty(x.shape) if out is None else out
    count, width = x.shape
    block = rows_per_block(width)
    with device_of(x):
        _normalize[(cdiv(count, block),)](x, out, count, x.stride(0), normalize, width, block, block_of(width))
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
        _normalize_backward[(cdiv(count, block),)](
            partials, x, dx, split, count, x.stride(0), normalize, width, block, block_of(width)
        )


def row_constant(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """delta − dlse = Σ_j out_nj dout_nj − dlse_n, which the backward of a softmax subtracts in every row.

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
        _row_constant[(cdiv(count, block),)](out, dout, dlse, delta, count, width, block, block_of(width))
    return delta


def rows_per_block(width: int) -> int:
    """BLOCK: about 4096 numbers a block, at least one row."""
    return max(1, 4096 // block_of(width))


def specs(architecture: int) -> Iterator[Spec]:
    """The row passes at their shortest and longest rows; they multiply no matrices."""
    for width in (64, 256, 2048):
        tile = Tile(rows=rows_per_block(width), columns=width, warps=4, stages=3, shared=1)
        shape = {"D": width, "BLOCK": tile.rows, "BLOCK_D": width}
        counts = {"N": "i32", "x_stride": "i32"}
        yield spec(
            f"normalize bf16 d{width}", _normalize, {"x": "*bf16", "y": "*bf16", **counts},
            {"NORMALIZE": 1, **shape}, tile, matrix=False,
        )  # fmt: skip
        yield spec(
            f"normalize_backward bf16 d{width}", _normalize_backward,
            {"partials": "*fp32", "x": "*bf16", "dx": "*bf16", "SPLIT": "i32", **counts},
            {"NORMALIZE": 1, **shape}, tile, matrix=False,
        )  # fmt: skip
        yield spec(
            f"row_constant bf16 d{width}", _row_constant,
            {"out": "*bf16", "dout": "*bf16", "dlse": "*fp32", "delta": "*fp32", "N": "i32"}, shape, tile, matrix=False,
        )  # fmt: skip
