"""Row normalisation in registers and its backward, for tiles that hold whole rows.

    layer   y = (x − mean(x)) · r,  r = 1/sqrt(var(x) + 1e-5)     dx = r (dy − mean(dy) − y mean(dy ∘ y))
    l2      y = x · r,              r = 1/|x|, 0 if |x| ≤ 1e-12   dx = r (dy − y Σ(dy ∘ y))

The variance is biased and there is no affine part. NORMALIZE is 0 for none, 1 for layer, 2 for l2.
Tiles are [BLOCK, BLOCK_D] float32 of rows of length `width`, zero beyond it, and stay zero beyond it.
"""

import triton
import triton.language as tl

NONE, LAYER, L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LAYER_EPS = tl.constexpr(1e-5)
L2_EPS = tl.constexpr(1e-12)


@triton.jit
def normalize_rows(x, columns, width, NORMALIZE: tl.constexpr):
    """(y, r): the normalised rows [BLOCK, BLOCK_D] and the factor r [BLOCK] that the backward wants."""
    if NORMALIZE == LAYER:
        mean = tl.sum(x, axis=1) / width
        centred = tl.where((columns < width)[None, :], x - mean[:, None], 0.0)
        factor = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / width + LAYER_EPS)
        return centred * factor[:, None], factor
    elif NORMALIZE == L2:
        length = tl.sqrt_rn(tl.sum(x * x, axis=1))
        factor = tl.where(length <= L2_EPS, 0.0, 1.0 / length)  # a NaN length is not ≤ and stays NaN
        return x * factor[:, None], factor
    else:
        return x, tl.sum(x, axis=1) * 0.0 + 1.0


@triton.jit
def normalize_rows_backward(dy, y, factor, columns, width, NORMALIZE: tl.constexpr):
    """dx [BLOCK, BLOCK_D] from dy, y [BLOCK, BLOCK_D] and the factor [BLOCK] of `normalize_rows`."""
    if NORMALIZE == LAYER:
        mean = tl.sum(dy, axis=1) / width
        along = tl.sum(dy * y, axis=1) / width
        dx = (dy - mean[:, None] - y * along[:, None]) * factor[:, None]
        return tl.where((columns < width)[None, :], dx, 0.0)
    elif NORMALIZE == L2:
        along = tl.sum(dy * y, axis=1)
        return (dy - y * along[:, None]) * factor[:, None]
    else:
        return dy
