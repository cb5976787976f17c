"""Memory retrieval: one read, the read with hard shrinkage, usage counts.

Flops. S = q Kᵀ and P V are 2·N·M·d each: 4·N·M·d forward. The backward pass needs dP = dO Vᵀ, dq = dS K, and the
memory's gradient dSᵀ q and Pᵀ dO: 8·N·M·d where P was kept, 10·N·M·d where it is recomputed. The floor counts 12·N·M·d
for both passes: a kernel that keeps nothing of size [N, M] does 14 and reaches 86% of the floor at the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as F
from anomem.testing import draw
from benchmarks.case import Function
from benchmarks.operators.base import Dims, Operator, Work, capped


def inputs(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Queries [N, d] and prototypes [M, d]."""
    query = draw(dims["N"], dims["d"], dtype=dtype, seed=seed)
    return query, draw(dims["M"], dims["d"], dtype=dtype, seed=seed + 1)


def retrieve(impl: str) -> Function:
    """The library's retrieval."""
    return lambda query, prototypes: F.hopfield_retrieve(query, prototypes, impl=impl)


def shrink(impl: str) -> Function:
    """The library's retrieval with MemAE's shrinkage at 1/M, the low end of what MemAE recommends."""
    return lambda query, prototypes: F.hopfield_retrieve(query, prototypes, shrink=1 / prototypes.shape[0], impl=impl)


def usage(impl: str) -> Function:
    """Mean retrieval weight of each prototype, out of the whole set of memory figures."""
    return lambda query, prototypes: F.memory_diagnostics(query, prototypes, impl=impl).mass


def work(dims: Dims, itemsize: int, training: bool) -> Work:
    """See the file's head; one exponential for each query and prototype."""
    N, M, d = dims["N"], dims["M"], dims["d"]
    moved = 2 * N * d + M * d  # q, K are read; O written
    if training:
        moved += 4 * N * d + 2 * M * d  # q, K, O, dO are read; dq, dK written
    return Work((12 if training else 4) * N * M * d, moved * itemsize, N * M)


def stored(dims: Dims) -> int:
    """The weights [N, M]."""
    return dims["N"] * dims["M"]


def smaller(dims: Dims) -> Dims:
    """Fewer queries; an odd number, so that the last tile is not full."""
    # B images with equally many queries each: odd where B is, or where there is none.
    images = dims.get("B", 1)
    return capped(dims, N=max(1, 2047 // images) * images)


RETRIEVE = Operator("retrieve", "softmax(β LN(q) LN(K)ᵀ) LN(K)", inputs, retrieve, work, stored, smaller)
SHRINK = Operator("shrink", "retrieval with hard shrinkage", inputs, shrink, work, stored, smaller)
USAGE = Operator("usage", "usage and entropy of a memory", inputs, usage, work, stored, smaller)
