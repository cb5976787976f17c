"""Operators without a gradient: the deviation map of inference and the usage of a memory, each one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.ops.library import accumulator, define, empty
from anomem.ops.retrieve import NORMALIZE_CODES

DISTANCE_CODES = {"cosine": 0, "l2": 1}


def _deviation_map_fake(
    feature_map: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: int,
    distance: int,
    log_prior: Tensor | None,
) -> Tensor:
    batch, _, height, width = feature_map.shape
    return empty(feature_map, batch, height, width, dtype=accumulator(feature_map))


def _usage_fake(
    query: Tensor, keys: Tensor, beta: Tensor | None, scale: float, normalize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(query)
    count, mass = empty(keys, keys.shape[0], dtype=torch.int64), empty(keys, keys.shape[0], dtype=dtype)
    return count, mass, empty(query, query.shape[0], dtype=dtype), empty(query, query.shape[1], dtype=dtype)


define(
    "native_deviation_map",
    "(Tensor map, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize, int distance, "
    "Tensor? log_prior) -> Tensor",
    _deviation_map_fake,
)
define(
    "native_usage",
    "(Tensor query, Tensor keys, Tensor? beta, float scale, int normalize) -> "
    "(Tensor count, Tensor mass, Tensor entropy, Tensor direction)",
    _usage_fake,
)


def deviation_map(
    feature_map: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: str,
    distance: str,
    log_prior: Tensor | None,
) -> Tensor:
    """[B, d, H, W] -> [B, H, W] in the accumulation dtype, by the native library, without the retrieved vectors."""
    codes = NORMALIZE_CODES[normalize], DISTANCE_CODES[distance]
    result: Tensor = torch.ops.anomem.native_deviation_map(feature_map, keys, values, beta, scale, *codes, log_prior)
    return result


def usage(
    query: Tensor, keys: Tensor, beta: Tensor | None, scale: float, normalize: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How queries [N, d] use a memory [M, d], in one pass.

    Returns:
        Counts [M] int64 of the strongest prototype, mean weights [M], entropy [N] of each query's weights and the mean
        [d] of HF(q)/|HF(q)|; all but the counts in the accumulation dtype.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.anomem.native_usage(
        query, keys, beta, scale, NORMALIZE_CODES[normalize]
    )
    return result
