"""What every kernel file shares: inner products, rounding, loads, and the facts a launch needs.

Everything here also runs in Triton's interpreter (`TRITON_INTERPRET=1`), which keeps bfloat16 as raw 16-bit integers:
arithmetic on it must be in float32, and it truncates where the hardware rounds to nearest even. `dot` and
`round_to` are the two places that know.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32.

    a: [X, Y], b: [Y, Z], acc: [X, Z] float32; PRECISION: "ieee" or "tf32", used by float32 operands only.
    """
    if INTERPRETING:
        # numpy's float32 products differ from machine to machine, and those of (b, a) from those of (a, b), as no GPU's
        # do; in P = exp(c / tau − lse) one unit in the last place of c is 1e-5 of P at tau = 0.005.
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), input_precision="ieee", out_dtype=tl.float64)
        acc = acc + product.to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rounded_product(x, y):
    """x y in float32, rounded here: the compiler cannot fuse it into a multiply-add with what is added to it next.

    x: [X, Y]; y: [X, Y], or what broadcasts to it.
    """
    return tl.fma(x, tl.broadcast_to(y, x.shape), tl.zeros(x.shape, tl.float32))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 → dtype, to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def load_rows(base, rows, stride, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of a row-major matrix [count, WIDTH]; zero outside. Offsets are 64-bit.

    rows: [BLOCK] indices; stride: elements from row to row (columns are adjacent).
    """
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None]
    if WIDTH != BLOCK_D:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, x, rows, stride, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x [BLOCK, BLOCK_D] float32 into a matrix as `load_rows` reads it, rounded to the matrix's dtype."""
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None]
    if WIDTH != BLOCK_D:
        mask = mask & (columns < WIDTH)[None, :]
    target = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(target, round_to(x, base.dtype.element_ty), mask=mask)


# Triton's own of these two serve kernels as well, which makes them slow on the host, where a call of eight kernels asks
# for them twenty times.
def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def block_of(features: int, smallest: int = 16) -> int:
    """BLOCK_D of rows of this length: the next power of two, at least what a matrix instruction takes."""
    return max(next_power_of_2(features), smallest)


def allows_tf32() -> bool:
    """Whether the user lets float32 matrix products round their operands to TF32 (`torch.backends.cuda.matmul`)."""
    return torch.backends.cuda.matmul.allow_tf32


def precision(dtype: torch.dtype) -> str:
    """The PRECISION of `dot` for operands of this dtype."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches; nothing for a CPU tensor."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """Number of multiprocessors of the tensor's GPU; 2 for a CPU tensor, so that tests split their sums."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def split_loop(length: int, block: int, blocks: int, processors: int) -> tuple[int, int]:
    """How a loop is cut into parts that run side by side, so that every multiprocessor has up to two blocks.

    Args:
        length: of the loop.
        block: what one turn of it takes; a part is a multiple of it.
        blocks: of the launch without parts.
        processors: of the GPU.

    Returns:
        (number of parts, length of one), at least one part.
    """
    turns = max(cdiv(length, block), 1)
    parts = min(max(2 * processors // max(blocks, 1), 1), turns)
    turns_of_part = cdiv(turns, parts)
    return cdiv(turns, turns_of_part), turns_of_part * block
