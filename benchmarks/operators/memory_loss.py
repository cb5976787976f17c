"""L_COM + 0.05 · L_V of one scale (the bracket of Eq. 4): two retrievals, two NT-Xent losses, two variance hinges."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as F
from anomem.testing import draw
from benchmarks.case import Function
from benchmarks.operators import contrast, retrieval, sampling
from benchmarks.operators.base import Dims, Operator, Work, capped


def inputs(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Two views [n, B, d] and prototypes [M, d]."""
    views = contrast.pair({**dims, "G": dims["n"]}, dtype, seed)
    return (*views, draw(dims["M"], dims["d"], dtype=dtype, seed=seed + 2))


def ours(impl: str) -> Function:
    """The library's loss, symmetric, with the default weights."""

    def loss(z: Tensor, z_pair: Tensor, prototypes: Tensor) -> Tensor:
        contrasted, variance = F.contrasted_memory_loss(z, z_pair, prototypes, impl=impl)
        return contrasted + 0.05 * variance

    return loss


def work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Twice each part. The bytes of the parts are added up: a fusion across them could move less."""
    groups = {"G": dims["n"], "B": dims["B"], "d": dims["d"]}
    parts = (
        retrieval.work({"N": dims["n"] * dims["B"], "M": dims["M"], "d": dims["d"]}, itemsize, training),
        contrast.nt_xent_work(groups, itemsize, training),
        sampling.variance_work(groups, itemsize, training),
    )
    return Work(
        2 * sum(part.flops for part in parts),
        2 * sum(part.bytes for part in parts),
        2 * sum(part.exponentials for part in parts),
    )


MEMORY_LOSS = Operator(
    "memory_loss",
    "L_COM + 0.05 L_V of one scale",
    inputs,
    ours,
    work,
    lambda dims: 2 * dims["n"] * ((2 * dims["B"]) ** 2 + dims["B"] * dims["M"]),
    lambda dims: capped(dims, n=2, B=255),
    parts=("nt_xent", "retrieve", "variance"),
)
