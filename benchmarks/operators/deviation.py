"""The deviation map at inference: retrieval and distance at every position."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as F
from anomem.testing import draw
from benchmarks.case import Function
from benchmarks.operators.base import Dims, Operator, Work, capped


def inputs(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A map [B, d, H, H] and prototypes [M, d]."""
    feature_map = draw(dims["B"], dims["d"], dims["H"], dims["H"], dtype=dtype, seed=seed)
    return feature_map, draw(dims["M"], dims["d"], dtype=dtype, seed=seed + 1)


def ours(impl: str) -> Function:
    """The library's deviation map, cosine distance."""
    return lambda feature_map, prototypes: F.deviation_map(feature_map, prototypes, impl=impl)


def work(dims: Dims, itemsize: int, training: bool) -> Work:
    """4·N·M·d flops with N = B·H²; map and memory are read, one float32 a position is written."""
    N, M, d = dims["B"] * dims["H"] ** 2, dims["M"], dims["d"]
    return Work(4 * N * M * d, (N * d + M * d) * itemsize + 4 * N, N * M)


DEVIATION_MAP = Operator(
    "deviation_map",
    "1 − cos(z, HF(z)) at every position",
    inputs,
    ours,
    work,
    lambda dims: dims["B"] * dims["H"] ** 2 * dims["M"],
    lambda dims: capped(dims, B=5),
)
