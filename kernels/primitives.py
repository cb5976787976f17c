"""What the kernel files share: products, rounding, loads and stores, retrieval's memory and softmax, launch sizes.

Everything in this file also runs in Triton's interpreter (`TRITON_INTERPRET=1`). The interpreter keeps bfloat16 as raw
16-bit integers, so arithmetic on it must be in float32, and it truncates where the hardware rounds to nearest even.
`dot` and `round_to` are the two functions that correct for it.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, accumulated in float32.

    a: [X, Y], b: [Y, Z], accumulator: [X, Z] float32; PRECISION: "ieee" or "tf32", "ieee" for 16-bit operands. With
    "tf32" the matrix unit drops the last 13 bits of its operands: see `operand`.
    """
    if INTERPRETING:
        # numpy's float32 products differ between machines, and between a b and (bᵀ aᵀ)ᵀ. A GPU's do not. In
        # P = exp(c / tau − lse) one unit in the last place of c is 1e-5 of P at tau = 0.005.
        if PRECISION == "tf32":
            a, b = truncate_to_tf32(a), truncate_to_tf32(b)
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), input_precision="ieee", out_dtype=tl.float64)
        accumulator = accumulator + product.to(tl.float32)
    else:
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def rounded_product(x, y):
    """x y rounded to float32: the compiler cannot fuse the product and a following sum into one multiply-add.

    x: [X, Y]; y: [X, Y], or a shape that broadcasts to it.
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
def round_to_tf32(x):
    """float32 → the nearest TF32 number, ties away from zero, as cuBLAS rounds its operands. NaN stays NaN."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def truncate_to_tf32(x):
    """What the matrix unit reads of float32 operands; 16-bit operands as they are. For the interpreter."""
    if x.dtype == tl.float32:
        x = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x float32 as an operand of `dot`: rounded to dtype, or to TF32.

    Without this rounding the matrix unit would truncate: four times the error, and a bias towards zero.
    """
    x = round_to(x, dtype)
    if PRECISION == "tf32":
        x = round_to_tf32(x)
    return x


@triton.jit
def row_pointers(base, rows, columns, stride, count, WIDTH: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Pointers and mask, [BLOCK, BLOCK_D] each, into a row-major matrix [count, WIDTH]; offsets are 64-bit.

    rows: [BLOCK] indices; columns: [BLOCK_D] indices; stride: elements from row to row (columns are adjacent);
    MASK_COLUMNS: whether a column may lie outside the matrix.
    """
    mask = (rows < count)[:, None]
    if MASK_COLUMNS:
        mask = mask & (columns < WIDTH)[None, :]
    return base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask


@triton.jit
def load_rows(base, rows, stride, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whole rows, [BLOCK, BLOCK_D], of a matrix as in `row_pointers`; zero outside."""
    pointers, mask = row_pointers(base, rows, tl.arange(0, BLOCK_D), stride, count, WIDTH, WIDTH != BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(base, x, rows, stride, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write whole rows x [BLOCK, BLOCK_D] float32 into a matrix as in `row_pointers`, rounded to its dtype."""
    pointers, mask = row_pointers(base, rows, tl.arange(0, BLOCK_D), stride, count, WIDTH, WIDTH != BLOCK_D)
    tl.store(pointers, round_to(x, base.dtype.element_ty), mask=mask)


@triton.jit
def load_slice(base, rows, columns, stride, count, WIDTH: tl.constexpr):
    """Some columns of some rows, [BLOCK, BLOCK_D], of a matrix as in `row_pointers`; zero outside."""
    pointers, mask = row_pointers(base, rows, columns, stride, count, WIDTH, True)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_tile(
    base, first_row, count, first_feature, FEATURES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK, BLOCK_D] of a contiguous matrix [count, FEATURES], from a row and a feature on; zero outside.

    Only the tile's corner is a 64-bit number. Within the tile 32-bit offsets are enough and take half the registers.
    """
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    corner = base + tl.full((), first_row, tl.int64) * FEATURES + first_feature
    mask = (rows < count - first_row)[:, None]
    if FEATURES % BLOCK_D != 0:
        mask = mask & (columns < FEATURES - first_feature)[None, :]
    return tl.load(corner + (rows[:, None] * FEATURES + columns[None, :]), mask=mask, other=0.0)


class Memory(NamedTuple):
    """The arguments of `softmax(scale · beta · norm(Q) Kᵀ) V` beside the queries."""

    keys: Tensor
    """K [M, d], contiguous, already normalised."""
    values: Tensor | None
    """[M, dv], contiguous; None for V = K (a tied memory)."""
    beta: Tensor | None
    """0-dim, loaded by the kernel."""
    scale: float
    """Factor on beta; beta itself when that is None."""
    normalize: int
    """Of the queries: 0 none, 1 layer, 2 l2."""

    @property
    def read_values(self) -> Tensor:
        """V [M, dv]."""
        return self.keys if self.values is None else self.values


@triton.jit
def score_scale(beta, scale):
    """b = scale · beta, loaded by the kernel; beta is a pointer or None."""
    if beta is not None:
        scale = scale * tl.load(beta).to(tl.float32)
    return scale


@triton.jit
def finite_shift(maximum):
    """The shift to subtract from scores with this maximum: the maximum, or 0 for ±inf, since inf − inf is NaN."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def sign_and_steepness(b):
    """(±1, |b| in units of log 2): b S = steepness · (sign · S) for scores S.

    Scores are subtracted before b multiplies the difference: at |b S| = 1e5 the product alone has lost 0.008. A b of 0
    becomes a number at which an exponential is still 1, and −inf · b still −inf.
    """
    return tl.where(b < 0.0, -1.0, 1.0), tl.where(b == 0.0, 2.0**-126, tl.abs(b) * LOG2E)


@triton.jit
def online_softmax(scores, steepness, running_max, running_sum):
    """Add a tile of scores to a softmax over tiles: Milakov and Gimelshein 2018.

    scores: [BLOCK_N, BLOCK_M], times the sign of b; running_max, running_sum: [BLOCK_N], of the tiles before.
    Returns (weights, running_max, running_sum, shift, rescale): weights = exp2((scores − shift) steepness) [BLOCK_N,
    BLOCK_M]; the maximum and the sum with this tile; the shift [BLOCK_N]; the factor `rescale` [BLOCK_N] that converts
    any other sum over the tiles before to the new shift.
    """
    previous_max = running_max
    running_max = tl.maximum(running_max, tl.max(scores, axis=1))
    shift = finite_shift(running_max)
    weights = tl.exp2((scores - shift[:, None]) * steepness)
    rescale = tl.exp2((previous_max - shift) * steepness)
    return weights, running_max, running_sum * rescale + tl.sum(weights, axis=1), shift, rescale


@triton.jit
def store_softmax_sums(lse, normaliser, queries, N, shift, total, steepness):
    """lse [N], and the normaliser [N, 2]: the largest score times the sign of b, and log2 of the sum of exponentials.

    shift, total: [BLOCK_N]. From the two a backward has the forward's weights; from lse it would have them up to the
    rounding of a large lse.
    """
    log_total = tl.log2(total)
    flat = tl.where(steepness < 2.0**-125, 0.0, steepness)
    tl.store(lse + queries, (shift * flat + log_total) * LN2, mask=queries < N)
    at = normaliser + queries.to(tl.int64) * 2
    tl.store(at, shift, mask=queries < N)
    tl.store(at + 1, log_total, mask=queries < N)


@triton.jit
def load_normaliser(normaliser, queries, N):
    """(shift, log2 of the sum) [BLOCK_N] of `store_softmax_sums`; the log is inf outside, where weights are then 0.

    An infinite sum gives NaN, as softmax does.
    """
    inside = queries < N
    at = normaliser + queries.to(tl.int64) * 2
    log_total = tl.load(at + 1, mask=inside, other=float("inf"))
    log_total = tl.where(inside & (log_total == float("inf")), float("nan"), log_total)
    return tl.load(at, mask=inside, other=0.0), log_total


# Limit of the scratch of scores that the chunked schemes take at a time, and 1/32 of the memory of a smaller GPU. Not
# free memory, with which the chunks, and so the bits of the sums over them, would change from run to run.
SCRATCH_BYTES = 256 * 2**20


def scratch_bytes(device: torch.device) -> int:
    """Bytes of scores that a chunk on a device may take."""
    if device.type != "cuda":
        return SCRATCH_BYTES
    return min(SCRATCH_BYTES, torch.cuda.get_device_properties(device).total_memory // 32)


def library_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, [G, X, Y] · [G, Y, Z], without rounding the result to the operands' dtype.

    On the CPU, for the interpreter, as `dot` there: by float64, whose results do not depend on the place in a matrix.
    """
    if not a.is_cuda:
        return torch.bmm(a.double(), b.double()).float()
    return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


def add_library_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total [G, X, Z] float32, changed in place, + a b; None for zeros."""
    if total is None:
        return library_product(a, b)
    if not a.is_cuda:
        return total.add_(library_product(a, b))
    if a.dtype == torch.float32:
        return total.baddbmm_(a, b)
    return torch.baddbmm(total, a, b, out_dtype=torch.float32, out=total)


# triton.cdiv and triton.next_power_of_2 can also be called inside kernels, which makes them slow on the host. One call
# of eight kernels needs them twenty times.
def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def block_of(features: int, smallest: int = 16) -> int:
    """BLOCK_D of rows of this length: the next power of two, and at least the 16 of a matrix instruction."""
    return max(next_power_of_2(features), smallest)


def allows_tf32() -> bool:
    """Whether the user lets float32 matrix products round their operands to TF32.

    cuBLAS asks the same setting. It follows the older switches (`torch.backends.cuda.matmul.allow_tf32`,
    `torch.set_float32_matmul_precision`), which raise once the newer one was set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    """The PRECISION of `dot` for operands of this dtype."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


_NOTHING = contextlib.nullcontext()


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which Triton launches on the tensor's GPU.

    It does nothing for other tensors, and where that GPU is the current one.
    """
    # Not torch.cuda.current_device, which first asks whether CUDA is in use.
    if not tensor.is_cuda or tensor.device.index == torch._C._cuda_getDevice():
        return _NOTHING
    return torch.cuda.device_of(tensor)


def multiprocessors(tensor: Tensor) -> int:
    """Number of multiprocessors of the tensor's GPU; 2 for other tensors, so that tests split their sums."""
    return _multiprocessors_of_gpu(tensor.device) if tensor.is_cuda else 2


@functools.cache
def _multiprocessors_of_gpu(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_loop(length: int, block: int, blocks: int, processors: int) -> tuple[int, int]:
    """Cut a loop into parts that run side by side, so that every multiprocessor has up to two blocks.

    Args:
        length: of the loop.
        block: length of one iteration; a part is a multiple of it.
        blocks: of the launch without parts.
        processors: of the GPU.

    Returns:
        (number of parts, length of one), at least one part.
    """
    iterations = max(cdiv(length, block), 1)
    parts = min(max(2 * processors // max(blocks, 1), 1), iterations)
    iterations_per_part = cdiv(iterations, parts)
    return cdiv(iterations, iterations_per_part), iterations_per_part * block
