"""Retrieval: forward, backward, and the choice among three schemes.

    flash      d, dv ≤ 256: whole rows in registers, online softmax (`retrieve_flash`)
    resident   any d, dv, and M ≤ 256: whole score rows in registers, no backward (`retrieve_resident`)
    chunked    any d, dv, M: cuBLAS products over chunks of queries (`retrieve_chunked`)

Exact float32 is chunked: cuBLAS multiplies faster than a tile of fused multiply-adds.

The backward of TF32 rows, and beyond 128 features, is chunked too:
    - flash recomputes: 7 products of 2 N M d operations instead of 5;
    - only poor tiles of 256 features compile without spills. On sm_80 they have 32 rows, or 64 rows and 8 warps, which
      computes some products twice. On sm_100 one block fits a multiprocessor. On sm_90 no tile was found for separate
      values.
"""

import torch
from torch import Tensor

from anomem.kernels import retrieve_chunked, retrieve_flash, retrieve_resident, rows
from anomem.kernels.primitives import Memory, block_of, precision
from anomem.kernels.tile_table import Entry, fitting, kind_of


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale · beta · norm(Q) norm(K)ᵀ) V and its log-sum-exp.

    Args:
        query: [N, d], unit inner stride, any row stride.
        keys: [M, d], contiguous.
        values: [M, dv], contiguous, or None for V = norm(K).
        beta: 0-dim, loaded by the kernel, or None.
        scale: factor on beta; beta itself when that is None.
        normalize: 0 none, 1 layer, 2 l2.

    Returns:
        out [N, dv] in query's dtype, lse [N] float32, and the normaliser [N, 2] float32 that the backward takes.
    """
    if query.shape[0] == 0:
        width = (keys if values is None else values).shape[1]
        lse, normaliser = (query.new_empty(0, *size, dtype=torch.float32) for size in ((), (2,)))
        return query.new_empty(0, width), lse, normaliser
    entries = flash_entries(("retrieve_flash_forward",), query, values)
    if entries is not None:
        return retrieve_flash.forward(query, _flash_memory(keys, values, beta, scale, normalize), entries[0])
    memory = Memory(rows.normalized(keys, normalize), values, beta, scale, normalize)
    entry = resident_entry(query, keys)
    if entry is not None:
        return retrieve_resident.forward(rows.normalized(query, normalize), memory, entry)
    return retrieve_chunked.forward(query, memory)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: int,
    out: Tensor,
    lse: Tensor,
    normaliser: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients; deterministic.

    Args:
        dout: [N, dv], contiguous.
        dlse: [N] or None.
        query, keys, values, beta, scale, normalize: as in `forward`.
        out, lse, normaliser: the results of `forward`; lse is not read.

    Returns:
        dquery [N, d], dkeys [M, d], dvalues [M, dv] (empty when tied), dbeta (0-dim; empty without beta).
    """
    dkeys = keys.new_empty(keys.shape)
    dvalues = keys.new_empty(0) if values is None else values.new_empty(values.shape)
    if query.shape[0] == 0:
        dbeta = lse.new_empty(0) if beta is None else lse.new_zeros(())
        return query.new_empty(query.shape), dkeys.zero_(), dvalues.zero_(), dbeta
    entries = flash_entries(("retrieve_flash_query_gradient", "retrieve_flash_prototype_sums"), query, values)
    if entries is None:
        memory = Memory(rows.normalized(keys, normalize), values, beta, scale, normalize)
        gradients = retrieve_chunked.backward(dout, dlse, query, memory, out, normaliser)
    else:
        memory = _flash_memory(keys, values, beta, scale, normalize)
        gradients = retrieve_flash.backward(dout, dlse, query, memory, out, normaliser, entries)
    dquery, key_sums, value_sums, dbeta = gradients
    rows.normalized_backward(key_sums, keys, normalize, dkeys)
    if value_sums is not None and values is not None:
        rows.normalized_backward(value_sums, values, 0, dvalues)
    return dquery, dkeys, dvalues, lse.new_empty(0) if dbeta is None else dbeta


def _flash_memory(keys: Tensor, values: Tensor | None, beta: Tensor | None, scale: float, normalize: int) -> Memory:
    """The memory whose keys and values are operands of the flash kernels' products."""
    arithmetic = precision(keys.dtype)
    keys = rows.normalized(keys, normalize, precision=arithmetic)
    values = None if values is None else rows.normalized(values, rows.NONE.value, precision=arithmetic)
    return Memory(keys, values, beta, scale, normalize)


def flash_entries(kernels: tuple[str, ...], query: Tensor, values: Tensor | None) -> tuple[Entry, ...] | None:
    """The entries of the tile table for these flash kernels; None where rows are too long or no tile fits."""
    width = query.shape[1] if values is None else max(query.shape[1], values.shape[1])
    block = max(block_of(width), 64)  # shorter rows take the tile of 64
    kind = kind_of(query.dtype, precision(query.dtype))
    if block > 256 or kind == "ieee":
        return None
    entries = tuple((kernel, kind, block) for kernel in kernels)
    return entries if all(fitting(entry, query.device) for entry in entries) else None


def resident_entry(query: Tensor, keys: Tensor) -> Entry | None:
    """The entry of the tile table for the resident kernel; None where the memory is too large or no tile fits."""
    block = retrieve_resident.block_of_memory(keys.shape[0])
    if query.dtype == torch.float32 or block > retrieve_resident.MOST_PROTOTYPES:
        return None
    entry = ("retrieve_resident", "half", block)
    return entry if fitting(entry, query.device) else None
