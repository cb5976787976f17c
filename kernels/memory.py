"""What the schemes of retrieval share: the memory that is read, and the factor on its scores."""

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
