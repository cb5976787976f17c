"""What the contrastive kernels share: score tiles, the temperature, and the plan of a launch.

Products are those of scaled rows, x_i·y_j; the cosines are c_ij = m_i m_j (x_i·y_j) with the factors of
`contrast_rows`, and the logits of the loss c_ij / tau.

Feature axis
    Up to `WHOLE` features a block holds its rows whole, and the tile of streamed rows is read once for both
    products. Beyond, the products are summed over slices of BLOCK_D features, and a backward block owns BLOCK_OUT
    features of its rows' gradient: the products are computed d / BLOCK_OUT times, and nothing of their size is stored.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from anomem.kernels.common import block_of, dot, precision, rounded_product
from anomem.kernels.tiles import TABLE, Key, Tile, fitting, kind_of

# Down to this temperature 2/tau · log2(e) ≤ 126: exp((c − 1) / tau) cannot underflow in float32, and the constant 1/tau
# replaces the running maximum.
LOWEST_FIXED_SHIFT = 0.023
# A backward tile of 256 features spills: the gradient alone takes half of the registers.
WHOLE = {
    "contrast_forward": {"half": 256, "tf32": 128, "ieee": 64},
    "contrast_backward": {"half": 128, "tf32": 64, "ieee": 64},
}
SLICE = {"half": 64, "tf32": 32, "ieee": 32}


@triton.jit
def inverse_temperature(inverse_tau, temperature):
    """1/tau: the number, or from the 0-dim tensor where the temperature is learned."""
    if temperature is not None:
        return 1.0 / tl.load(temperature)
    return inverse_tau


@triton.jit
def load_tile(
    base, first_row, count, first_feature, FEATURES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK, BLOCK_D] of a contiguous matrix [count, FEATURES], from a row and a feature on; zero outside.

    The tile's place is one 64-bit number; within the tile 32 bits do, and cost half the registers.
    """
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    corner = base + tl.full((), first_row, tl.int64) * FEATURES + first_feature
    mask = (rows < count - first_row)[:, None]
    if FEATURES % BLOCK_D != 0:
        mask = mask & (columns < FEATURES - first_feature)[None, :]
    return tl.load(corner + (rows[:, None] * FEATURES + columns[None, :]), mask=mask, other=0.0)


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

    Its bits do not depend on which of the two rows is x nor on what follows. So where one column has all the weight,
    its cosine minus the maximum and its logit minus lse are 0, and not the rounding error of a cosine over tau.
    """
    return rounded_product(product, x_factor[:, None] * y_factor[None, :])


@triton.jit
def opposite(rows, count):
    """Index of each row's positive among the rows of two joined views: i + B for the first, i − B for the second."""
    half = count // 2
    return tl.where(rows < half, rows + half, rows - half)


@triton.jit
def is_special(x_begin, y_begin, count, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """Whether a tile of two joined views holds a diagonal element, a positive or padding; most hold none."""
    half = count // 2
    diagonal = (y_begin < x_begin + BLOCK_X) & (x_begin < y_begin + BLOCK_Y)
    above = (y_begin < x_begin + half + BLOCK_X) & (x_begin + half < y_begin + BLOCK_Y)
    below = (y_begin + half < x_begin + BLOCK_X) & (x_begin < y_begin + half + BLOCK_Y)
    return diagonal | above | below | (y_begin + BLOCK_Y > count)


@triton.jit
def load_index(index, rows, count):
    """[BLOCK] int32 column index per row, −1 where there is no row; a column index out of int32 stays out of range."""
    value = tl.load(index + rows, mask=rows < count, other=-1)
    return tl.minimum(tl.maximum(value, -1), 0x7FFFFFFF).to(tl.int32)


def has_fixed_shift(rows: torch.Tensor, temperature: torch.Tensor | None, tau: float) -> bool:
    """Whether exponentials need no running maximum.

    A learned temperature is not known before the launch. Exact float32 keeps the maximum: exponents of up to 126 cost
    7 of its 24 bits, more than plain PyTorch loses, and there the exponentials are not what takes the time.
    """
    exact = rows.dtype == torch.float32 and precision(rows.dtype) == "ieee"
    return temperature is None and tau >= LOWEST_FIXED_SHIFT and not exact


def sees_one_column(positive: torch.Tensor | None, exclude: torch.Tensor | None, columns: int) -> bool:
    """Whether each row sees its positive alone: its loss and its gradient are 0, and nothing may round them."""
    return columns == 2 if positive is None else columns == 1 and exclude is None


class Plan(NamedTuple):
    """How the features of a launch are cut up, whatever its tile."""

    entry: Key
    """Of the tile table."""
    block_d: int
    """BLOCK_D of the products."""
    block_out: int
    """BLOCK_OUT, the features of the gradient that one backward block owns."""
    sliced: bool
    precision: str


def plan(kernel: str, owned: torch.Tensor) -> Plan:
    """Cut up the features of the rows that the blocks own.

    Args:
        kernel: "contrast_forward" or "contrast_backward".
        owned: [G, X, d].

    Raises:
        RuntimeError: no tile of the table fits the GPU.
    """
    features = owned.shape[2]
    arithmetic = precision(owned.dtype)
    kind = kind_of(owned.dtype, arithmetic)
    whole = WHOLE[kernel][kind]
    sliced = features > whole
    block_d = SLICE[kind] if sliced else block_of(features)
    entry = kernel, kind, 2 * whole if sliced else max(block_d, 64)
    if not fitting(entry, owned.device):
        raise RuntimeError(f"no tile of {kernel} for {owned.dtype}, d = {features} fits the shared memory of this GPU")
    return Plan(entry, block_d, min(block_of(features), whole), sliced, arithmetic)


class Point(NamedTuple):
    """What a tile of the table is compiled for ahead of time."""

    kind: str
    features: int
    sliced: bool
    block_d: int
    block_out: int
    precision: str
    fixed: bool
    """Whether also with the fixed shift."""
    tile: Tile


def points(kernel: str, architecture: int) -> Iterator[Point]:
    """Every tile of the table at rows that fill their blocks, and at rows that leave a rest, which needs masks.

    Args:
        kernel: "contrast_forward" or "contrast_backward".
        architecture: a row of the table.
    """
    for (name, kind, key), tiles in TABLE.items():
        if name != kernel:
            continue
        whole = WHOLE[kernel][kind]
        sliced = key > whole
        block_d = SLICE[kind] if sliced else key
        arithmetic = "tf32" if kind == "tf32" else "ieee"
        for tile in tiles[architecture]:
            for features in (key, key - 8):
                # Of float32 only where it is rounded to TF32: see `has_fixed_shift`.
                fixed = kind != "ieee" and features == key
                yield Point(kind, features, sliced, block_d, min(key, whole), arithmetic, fixed, tile)
