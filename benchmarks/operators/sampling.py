"""Gather of sampled positions and the variance hinge: no matrix product, so bytes alone make the floor."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as F
from anomem.testing import draw
from benchmarks.case import Function
from benchmarks.operators.base import Dims, Operator, Work, capped


def map_and_positions(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A map [B, C, H, H] and n distinct positions [n] int64."""
    B, C, H, n = (dims[name] for name in ("B", "C", "H", "n"))
    generator = torch.Generator().manual_seed(seed)
    return draw(B, C, H, H, dtype=dtype, seed=seed), torch.randperm(H * H, generator=generator)[:n]


def gather(impl: str) -> Function:
    """The library's gather with L2 normalisation."""
    return lambda feature_map, positions: F.gather_positions(feature_map, positions, normalize=True, impl=impl)


def gather_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Forward reads and writes n·B·C elements; backward reads gradient and result and writes the whole map."""
    B, C, H, n = (dims[name] for name in ("B", "C", "H", "n"))
    picked = n * B * C
    return Work(0, (2 * picked + (2 * picked + B * C * H * H if training else 0)) * itemsize)


GATHER = Operator(
    "gather",
    "n positions of a map, L2-normalised",
    map_and_positions,
    gather,
    gather_work,
    lambda dims: dims["n"] * dims["B"] * dims["C"],
    lambda dims: capped(dims, B=64),
    width="C",
)


def rows(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """x [G, B, d], of standard deviation 0.9 so that the hinge is active in most coordinates."""
    return (draw(dims["G"], dims["B"], dims["d"], dtype=dtype, seed=seed, scale=0.9),)


def variance(impl: str) -> Function:
    """The library's variance hinge, mean over groups."""
    return lambda x: F.variance_hinge(x, impl=impl)


def variance_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Forward reads x; backward reads x and writes its gradient."""
    elements = dims["G"] * dims["B"] * dims["d"]
    return Work(0, elements * itemsize * (3 if training else 1))


VARIANCE = Operator(
    "variance",
    "hinge on the standard deviation",
    rows,
    variance,
    variance_work,
    lambda dims: dims["G"] * dims["B"] * dims["d"],
    lambda dims: capped(dims, G=8),
)


def sample(impl: str) -> Function:
    """Gather with L2 normalisation, then the variance hinge of what was gathered."""
    return lambda feature_map, positions: F.variance_hinge(gather(impl)(feature_map, positions), impl=impl)


def sample_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Forward reads n·B·C elements; backward reads them again and writes the whole map."""
    B, C, H, n = (dims[name] for name in ("B", "C", "H", "n"))
    picked = n * B * C
    return Work(0, (picked + (picked + B * C * H * H if training else 0)) * itemsize)


SAMPLE = Operator(
    "sample",
    "n positions of a map, L2-normalised, and the hinge on their standard deviation",
    map_and_positions,
    sample,
    sample_work,
    lambda dims: dims["n"] * dims["B"] * dims["C"],
    lambda dims: capped(dims, B=64),
    width="C",
    parts=("gather", "variance"),
)
