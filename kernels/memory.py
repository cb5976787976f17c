"""What the schemes of retrieval share: the memory that is read, the factor on its scores, and their softmax."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Memory(NamedTuple):
    """What `softmax(scale · beta · norm(Q) Kᵀ) V` takes beside the queries."""

    keys: Tensor
    """K [M, d], contiguous, normalised already."""
    values: Tensor | None
    """[M, dv], contiguous; None for V = K."""
    beta: Tensor | None
    """0-dim, read on the device."""
    scale: float
    """Factor on beta, or beta itself when that is None."""
    normalize: int
    """Of the queries: 0 none, 1 layer, 2 l2."""

    @property
    def read(self) -> Tensor:
        """V [M, dv]."""
        return self.keys if self.values is None else self.values


@triton.jit
def inverse_temperature(beta, scale):
    """b = scale · beta, read on the device; beta is a pointer or None."""
    if beta is not None:
        scale = scale * tl.load(beta).to(tl.float32)
    return scale


@triton.jit
def finite_shift(top):
    """What is subtracted from scores with this maximum: the maximum, and 0 for ±inf, since inf − inf is no number."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def online_softmax(s, top, total):
    """Take a tile of scores into a softmax: Milakov and Gimelshein 2018.

    s: [BLOCK_N, BLOCK_M], in units of log 2; top, total: [BLOCK_N], the maximum and the sum of the tiles before.
    Returns (p, top, total, shift, rescale): p = exp2(s − shift) [BLOCK_N, BLOCK_M]; top and total with this tile; the
    factor `rescale` [BLOCK_N] takes other sums of the tiles before to the new shift [BLOCK_N].
    """
    past = top
    top = tl.maximum(top, tl.max(s, axis=1))
    shift = finite_shift(top)
    p = tl.exp2(s - shift[:, None])
    rescale = tl.exp2(past - shift)
    return p, top, total * rescale + tl.sum(p, axis=1), shift, rescale
