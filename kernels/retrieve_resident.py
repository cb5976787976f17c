"""Retrieval forward with the whole score row in registers, for rows too long for `retrieve_flash` and a small memory.

    S = b norm(Q) Kᵀ, summed over slices of the features;   P = softmax(S), L = logsumexp(S);   O = P V, slice by slice

A block owns BLOCK_N queries and all M ≤ BLOCK_M prototypes, so that d and dv may have any length and S is never
written: two passes over slices of BLOCK_D features, one product each, no running maximum in between. b = scale · beta;
query and keys are normalised already.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.common import LN2, LOG2E, cdiv, device_of, dot, next_power_of_2, round_to
from anomem.kernels.memory import Memory, finite_shift, inverse_temperature
from anomem.kernels.specs import Spec, spec
from anomem.kernels.tiles import TABLE, Key, Tile
from anomem.kernels.tuning import Launched, Site, launch

# Features that a product takes at a time: one row of a shared-memory swizzle in 16 bits.
BLOCK_D = 64
# 512 scores a row would leave 64 rows to a block: then it reads the memory from L2 faster than L2 delivers, and where d
# is no multiple of BLOCK_D it spills.
MOST_PROTOTYPES = 256


@triton.jit
def load_slice(base, rows, columns, stride, count, WIDTH: tl.constexpr):
    """[BLOCK, BLOCK_D] of a row-major matrix [count, WIDTH] at these rows and columns; zero outside."""
    mask = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _forward(
    query, keys, values, beta, out, lse, N, M, query_stride, scale,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    b = inverse_temperature(beta, scale) * LOG2E
    s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(0, D, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        q = load_slice(query, n, columns, query_stride, N, D)  # [BLOCK_N, BLOCK_D]
        k = load_slice(keys, m, columns, D, M, D)  # [BLOCK_M, BLOCK_D]
        s = dot(q, tl.trans(k), s, "ieee")
    s = tl.where((m < M)[None, :], s * b, float("-inf"))  # [BLOCK_N, BLOCK_M]
    shift = finite_shift(tl.max(s, axis=1))
    p = tl.exp2(s - shift[:, None])
    total = tl.sum(p, axis=1)
    tl.store(lse + n, (shift + tl.log2(total)) * LN2, mask=n < N)
    weights = round_to(p, out.dtype.element_ty)
    for begin in range(0, DV, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        v = load_slice(values, m, columns, DV, M, DV)  # [BLOCK_M, BLOCK_D]
        o = dot(weights, v, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), "ieee") / total[:, None]
        target = out + n.to(tl.int64)[:, None] * DV + columns[None, :]
        tl.store(target, round_to(o, out.dtype.element_ty), mask=(n < N)[:, None] & (columns < DV)[None, :])


def forward(query: Tensor, memory: Memory, entry: Key) -> tuple[Tensor, Tensor]:
    """One block per tile of queries.

    Args:
        query: [N, d] bfloat16 or float16, N ≥ 1, unit inner stride, normalised already.
        memory: of at most MOST_PROTOTYPES prototypes.
        entry: of the tile table; a tile's rows are BLOCK_N.

    Returns:
        out [N, dv] in query's dtype, lse [N] float32.
    """
    keys, _, beta, scale, _ = memory
    (count, d), dv = query.shape, memory.read.shape[1]
    out, lse = query.new_empty(count, dv), query.new_empty(count, dtype=torch.float32)

    def run(tile: Tile) -> Launched:
        return Launched(_forward[(cdiv(count, tile.rows),)](
            query, keys, memory.read, beta, out, lse, count, keys.shape[0], query.stride(0), scale,
            d, dv, tile.rows, block_of_memory(keys.shape[0]), BLOCK_D, **tile.options,
        ))  # fmt: skip

    facts = {"dtype": query.dtype, "d": d, "dv": dv, "beta": beta is not None}
    with device_of(query):
        launch(Site(entry, facts, count, keys.shape[0], query.device), run)
    return out, lse


def block_of_memory(prototypes: int) -> int:
    """BLOCK_M: the next power of two, from 64 on."""
    return max(64, next_power_of_2(prototypes))


def specs(architecture: int) -> Iterator[Spec]:
    """Every tile of the table with a learned beta, at rows of whole slices and at others."""
    arguments = dict.fromkeys(("query", "keys", "values", "out"), "*bf16") | dict.fromkeys(("beta", "lse"), "*fp32")
    arguments |= dict.fromkeys(("N", "M", "query_stride"), "i32") | {"scale": "fp32"}
    for (kernel, kind, _), tiles in TABLE.items():
        if kernel != "retrieve_resident":
            continue
        for tile in tiles[architecture]:
            for width in (512, 504):
                constants = {
                    "D": width, "DV": width, "BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "BLOCK_D": BLOCK_D,
                }  # fmt: skip
                yield spec(f"retrieve_resident {kind} d{width}", _forward, arguments, constants, tile)
