"""Retrieval forward with the whole score row in registers, for rows too long for `retrieve_flash` and a small memory.

    S = b norm(Q) Kᵀ, summed over slices of the features;   P = softmax(S), L = logsumexp(S);   O = P V, slice by slice

A block owns BLOCK_N queries and all M ≤ BLOCK_M prototypes. So d and dv may have any length, S is never written, and
no running maximum is needed: the kernel makes two passes over slices of BLOCK_D features with one product each.
b = scale · beta; queries and keys are already normalised.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    Memory,
    cdiv,
    device_of,
    dot,
    finite_shift,
    load_slice,
    next_power_of_2,
    round_to,
    score_scale,
    sign_and_steepness,
    store_softmax_sums,
)
from anomem.kernels.tile_search import Launched, Site, launch
from anomem.kernels.tile_table import Entry, Tile

# Features that one product takes: one row of a shared-memory swizzle in 16 bits.
BLOCK_D = 64
# With 512 scores a row a block would have 64 rows. It would need the memory faster than L2 delivers it, and would spill
# where d is no multiple of BLOCK_D.
MOST_PROTOTYPES = 256


@triton.jit(do_not_specialize=["N", "M"])
def retrieve_resident_kernel(
    query,  # [N, d]
    keys,  # [M, d]
    values,  # [M, dv]; the keys themselves when tied
    beta,  # 0-dim, or None
    out,  # [N, dv]
    lse,  # [N] float32
    normaliser,  # [N, 2] float32: see `store_softmax_sums`
    N,
    M,
    query_stride,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries against the whole memory. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    prototypes = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    sign, steepness = sign_and_steepness(score_scale(beta, scale))
    scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(0, D, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        query_slice = load_slice(query, queries, columns, query_stride, N, D)  # [BLOCK_N, BLOCK_D]
        key_slice = load_slice(keys, prototypes, columns, D, M, D)  # [BLOCK_M, BLOCK_D]
        scores = dot(query_slice, tl.trans(key_slice), scores, "ieee")
    scores = tl.where((prototypes < M)[None, :], scores * sign, float("-inf"))  # [BLOCK_N, BLOCK_M]
    shift = finite_shift(tl.max(scores, axis=1))  # [BLOCK_N]
    exponentials = tl.exp2((scores - shift[:, None]) * steepness)
    total = tl.sum(exponentials, axis=1)  # [BLOCK_N]
    store_softmax_sums(lse, normaliser, queries, N, shift, total, steepness)
    weights = round_to(exponentials, out.dtype.element_ty)
    for begin in range(0, DV, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        value_slice = load_slice(values, prototypes, columns, DV, M, DV)  # [BLOCK_M, BLOCK_D]
        out_slice = dot(weights, value_slice, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), "ieee") / total[:, None]
        # Not `row_pointers`: computing the mask first takes four more registers on sm_100.
        target = out + queries.to(tl.int64)[:, None] * DV + columns[None, :]
        mask = (queries < N)[:, None] & (columns < DV)[None, :]
        tl.store(target, round_to(out_slice, out.dtype.element_ty), mask=mask)


def forward(query: Tensor, memory: Memory, entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    """One block per tile of queries.

    Args:
        query: [N, d] bfloat16 or float16, N ≥ 1, unit inner stride, already normalised.
        memory: of at most MOST_PROTOTYPES prototypes.
        entry: of the tile table; a tile's rows are BLOCK_N.

    Returns:
        out [N, dv] in query's dtype, lse [N] float32, normaliser [N, 2] float32.
    """
    keys, _, beta, scale, _ = memory
    values = memory.read_values
    (count, d), dv = query.shape, values.shape[1]
    out = query.new_empty(count, dv)
    lse, normaliser = (query.new_empty(count, *width, dtype=torch.float32) for width in ((), (2,)))

    def run(tile: Tile) -> Launched:
        compiled = launch_kernel(retrieve_resident_kernel, (cdiv(count, tile.rows),),
            query, keys, values, beta, out, lse, normaliser, count, keys.shape[0], query.stride(0), scale,
            D=d, DV=dv, BLOCK_N=tile.rows, BLOCK_M=block_of_memory(keys.shape[0]), BLOCK_D=BLOCK_D, **tile.options,
        )  # fmt: skip
        return Launched(compiled)

    facts = {"dtype": query.dtype, "d": d, "dv": dv, "beta": beta is not None}
    with device_of(query):
        launch(Site(entry, facts, count, keys.shape[0], query.device), run)
    return out, lse, normaliser


def block_of_memory(prototypes: int) -> int:
    """BLOCK_M: the next power of two, from 64 on."""
    return max(64, next_power_of_2(prototypes))
