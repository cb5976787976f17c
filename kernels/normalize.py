"""Row normalisation in registers and its backward, for tiles that hold whole rows.

    layer   y = (x − mean(x)) · r,  r = 1/sqrt(var(x) + 1e-5)     dx = r (dy − mean(dy) − y mean(dy ∘ y))
    l2      y = x · r,              r = 1/|x|, 0 if |x| ≤ 1e-12   dx = r (dy − y Σ(dy ∘ y))

The variance is biased and there is no affine part. NORMALIZE is 0 for none, 1 for layer, 2 for l2. Tiles are
[BLOCK, BLOCK_D] float32 and hold rows of length WIDTH, zero beyond it; what comes out is zero beyond it too.
"""

import triton
import triton.language as tl

NONE, LAYER, L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LAYER_EPS = tl.constexpr(1e-5)
L2_EPS = tl.constexpr(1e-12)


@triton.jit
def normalize_rows(x, NORMALIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(y, r): the normalised rows [BLOCK, BLOCK_D] and the factor r [BLOCK] that the backward wants."""
    if NORMALIZE == LAYER:
        mean = tl.sum(x, axis=1) / WIDTH
        y = within(x - mean[:, None], WIDTH, BLOCK_D)
        factor = 1.0 / tl.sqrt_rn(tl.sum(y * y, axis=1) / WIDTH + LAYER_EPS)
        y = y * factor[:, None]
    elif NORMALIZE == L2:
        length = tl.sqrt_rn(tl.sum(x * x, axis=1))
        factor = tl.where(length <= L2_EPS, 0.0, 1.0 / length)  # a NaN length is not ≤ and stays NaN
        y = x * factor[:, None]
    else:
        y = x
        factor = tl.full((x.shape[0],), 1.0, tl.float32)
    return y, factor


@triton.jit
def normalize_rows_backward(dy, y, factor, NORMALIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """dx [BLOCK, BLOCK_D] from dy, y [BLOCK, BLOCK_D] and the factor [BLOCK] of `normalize_rows`."""
    if NORMALIZE == LAYER:
        mean = tl.sum(dy, axis=1) / WIDTH
        along = tl.sum(dy * y, axis=1) / WIDTH
        dx = within(dy - mean[:, None] - y * along[:, None], WIDTH, BLOCK_D) * factor[:, None]
    elif NORMALIZE == L2:
        along = tl.sum(dy * y, axis=1)
        dx = (dy - y * along[:, None]) * factor[:, None]
    else:
        dx = dy
    return dx


@triton.jit
def within(x, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [BLOCK, BLOCK_D] with zeros in the columns beyond WIDTH."""
    if WIDTH != BLOCK_D:
        x = tl.where((tl.arange(0, BLOCK_D) < WIDTH)[None, :], x, 0.0)
    return x
