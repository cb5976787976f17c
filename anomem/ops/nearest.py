"""The nearest prototypes of rows, and greedy k-center, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.ops import library
from anomem.ops.library import accumulator, define, empty

MOST = 32
"""Nearest prototypes of one call, and prototypes of one read with `top_k`."""


def _nearest_fake(x: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = prototypes.shape[0], x.shape[1], k
    return empty(x, *shape, dtype=accumulator(x)), empty(x, *shape, dtype=torch.int64)


def _k_center_fake(x: Tensor, count: int, first: int) -> Tensor:
    return empty(x, count, dtype=torch.int64)


for _backend in ("native", "triton"):
    define(
        f"{_backend}_nearest",
        "(Tensor x, Tensor prototypes, int k) -> (Tensor distance, Tensor index)",
        _nearest_fake,
    )
    define(f"{_backend}_k_center", "(Tensor x, int count, int first) -> Tensor", _k_center_fake)


def nearest(x: Tensor, prototypes: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """The k nearest prototypes of each row and bank.

    Args:
        x: [L, N, d] or [1, N, d], unit inner stride.
        prototypes: [L, M, d], contiguous.
        k: from 1 to M, at most `MOST`.
        backend: "native" or "triton".

    Returns:
        Squared distances [L, N, k] in the accumulation dtype and indices [L, N, k] int64.
    """
    result: tuple[Tensor, Tensor] = library.call("nearest", backend, x, prototypes, k)
    return result


def k_center(x: Tensor, count: int, first: int, backend: str) -> Tensor:
    """Indices of greedy k-center.

    Args:
        x: [N, d], unit inner stride.
        count: from 1 to N.
        first: index of the first.
        backend: "native" or "triton".

    Returns:
        [count] int64.
    """
    result: Tensor = library.call("k_center", backend, x, count, first)
    return result
