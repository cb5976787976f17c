"""Retrieval on GPUs: the choice among the schemes; the schemas are those of `anomem.ops.retrieve`.

    flash      d, dv ≤ 256: whole rows in registers, online softmax (`retrieve_flash`)
    resident   any d, dv, and M ≤ 256: whole score rows in registers, no backward (`retrieve_resident`)
    chunked    any d, dv, M: the library's matrix products over L2-sized chunks of queries (`retrieve_chunked`)

Exact float32 is chunked: the library multiplies better than a tile of fused multiply-adds would. So is the backward
beyond 128 features: there flash would recompute, 7 products of 2 N M d operations against 5 of the chunked scheme, in
poor tiles. Those of 256 features that do not spill have 32 rows or 8 warps for 64 of them on sm_80, which computes some
products twice, and one block per multiprocessor on sm_100; on sm_90 none was found for separate values.
"""

import torch
from torch import Tensor

from anomem.kernels import retrieve_chunked, retrieve_flash, retrieve_resident, rows
from anomem.kernels.common import block_of, precision
from anomem.kernels.memory import Memory
from anomem.kernels.tiles import Key, fitting, kind_of


def forward(
    query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None, scale: float, normalize: int
) -> tuple[Tensor, Tensor]:
    """What the memory returns.

    Args:
        query: [N, d], unit inner stride, any row stride.
        keys: [M, d], contiguous.
        values: [M, dv], contiguous, or None for V = norm(K).
        beta: 0-dim, read on the device, or None.
        scale: factor on beta, or beta itself when that is None.
        normalize: 0 none, 1 layer, 2 l2.

    Returns:
        out [N, dv] in query's dtype and lse [N] float32.
    """
    if query.shape[0] == 0:
        width = (keys if values is None else values).shape[1]
        return query.new_empty(0, width), query.new_empty(0, dtype=torch.float32)
    memory = Memory(rows.normalized(keys, normalize), values, beta, scale, normalize)
    entries = flash_tiles(("retrieve_forward",), query, values)
    if entries is not None:
        return retrieve_flash.forward(query, memory, entries[0], precision(query.dtype))
    entry = resident_tile(query, keys)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients; deterministic.

    Args:
        dout: [N, dv], contiguous.
        dlse: [N] or None.
        query, keys, values, beta, scale, normalize: as in `forward`.
        out, lse: what `forward` returned.

    Returns:
        dquery [N, d], dkeys [M, d], dvalues [M, dv] (empty when tied), dbeta (0-dim; empty without beta).
    """
    dkeys = keys.new_empty(keys.shape)
    dvalues = keys.new_empty(0) if values is None else values.new_empty(values.shape)
    if query.shape[0] == 0:
        dbeta = lse.new_empty(0) if beta is None else lse.new_zeros(())
        return query.new_empty(query.shape), dkeys.zero_(), dvalues.zero_(), dbeta
    memory = Memory(rows.normalized(keys, normalize), values, beta, scale, normalize)
    entries = flash_tiles(("retrieve_query_gradient", "retrieve_prototype_sums"), query, values)
    if entries is None:
        gradients = retrieve_chunked.backward(dout, dlse, query, memory)
    else:
        gradients = retrieve_flash.backward(dout, dlse, query, memory, out, lse, entries, precision(query.dtype))
    dquery, key_sums, value_sums, dbeta = gradients
    rows.normalized_backward(key_sums, keys, normalize, dkeys)
    if value_sums is not None and values is not None:
        rows.normalized_backward(value_sums, values, 0, dvalues)
    return dquery, dkeys, dvalues, lse.new_empty(0) if dbeta is None else dbeta


def flash_tiles(kernels: tuple[str, ...], query: Tensor, values: Tensor | None) -> tuple[Key, ...] | None:
    """Where the tile table has these flash kernels, or None where the rows are too long or no tile fits."""
    width = query.shape[1] if values is None else max(query.shape[1], values.shape[1])
    block = max(block_of(width), 64)  # shorter rows take the tile of 64
    kind = kind_of(query.dtype, precision(query.dtype))
    if block > 256 or kind == "ieee":
        return None
    entries = tuple((kernel, kind, block) for kernel in kernels)
    return entries if all(fitting(entry, query.device) for entry in entries) else None


def resident_tile(query: Tensor, keys: Tensor) -> Key | None:
    """Where the tile table has the resident kernel, or None where the memory is too large or no tile fits."""
    block = retrieve_resident.block_of_memory(keys.shape[0])
    if query.dtype == torch.float32 or block > retrieve_resident.MOST_PROTOTYPES:
        return None
    entry = ("retrieve_resident", "half", block)
    return entry if fitting(entry, query.device) else None
