"""The deviation map of inference: the distance between feature and retrieval in one pass, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.ops.library import Memory, accumulator, define, empty
from anomem.reference import Distance

DISTANCE_CODES: dict[Distance, int] = {"cosine": 0, "l2": 1}
"""What the kernels receive for `distance`; the order is that of csrc/."""


def _deviation_map_fake(
    map: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: int,
    distance: int,
    log_prior: Tensor | None,
) -> Tensor:
    batch, _, height, width = map.shape
    return empty(map, batch, height, width, dtype=accumulator(map))


define(
    "native_deviation_map",
    "(Tensor map, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize, int distance, "
    "Tensor? log_prior) -> Tensor",
    _deviation_map_fake,
)


def deviation_map(feature_map: Tensor, memory: Memory, distance: Distance, log_prior: Tensor | None) -> Tensor:
    """Distances at every position, by the native library, without the retrieved vectors.

    Args:
        feature_map: [B, d, H, W], any layout.
        memory: keys and values [M, d] contiguous, beta in the accumulation dtype.
        distance: "cosine" or "l2".
        log_prior: [H·W, M] contiguous in the accumulation dtype, or None.

    Returns:
        [B, H, W] in the accumulation dtype.
    """
    result: Tensor = torch.ops.anomem.native_deviation_map(
        feature_map, *memory.operands, DISTANCE_CODES[distance], log_prior
    )
    return result
