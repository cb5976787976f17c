"""The usage of a memory by a set of queries, in one pass, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.ops.library import Memory, accumulator, define, empty


def _usage_fake(
    query: Tensor, keys: Tensor, beta: Tensor | None, scale: float, normalize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (count, features), prototypes, dtype = query.shape, keys.shape[0], accumulator(query)
    return (
        empty(keys, prototypes, dtype=torch.int64),
        empty(keys, prototypes, dtype=dtype),
        empty(query, count, dtype=dtype),
        empty(query, features, dtype=dtype),
    )


define(
    "native_usage",
    "(Tensor query, Tensor keys, Tensor? beta, float scale, int normalize) -> "
    "(Tensor count, Tensor mass, Tensor entropy, Tensor direction)",
    _usage_fake,
)


def usage(query: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How queries use a memory, by the native library.

    Args:
        query: [N, d], unit inner stride.
        memory: keys [M, d] contiguous, beta in the accumulation dtype; its values are not read.

    Returns:
        Counts [M] int64 of the strongest prototype, mean weights [M], entropy [N] of each query's weights and the mean
        [d] of HF(q)/|HF(q)|; all but the counts in the accumulation dtype.
    """
    keys, _, beta, scale, normalize = memory.operands
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.anomem.native_usage(query, keys, beta, scale, normalize)
    return result
