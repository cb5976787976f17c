"""Retrieval with whole rows in registers and a running maximum, for d, dv ≤ 256: nothing of size [N, M] is stored.

    forward    S = b norm(Q) Kᵀ,  P = softmax(S),  O = P V,  L = logsumexp(S)
    backward   dS = P ∘ (dO Vᵀ − delta),  delta_n = Σ_j O_nj dO_nj − dL_n
               dQ = (∂norm/∂Q)ᵀ b dS K,   dK = b dSᵀ norm(Q),   dV = Pᵀ dO,   db = Σ dS ∘ (norm(Q) Kᵀ)

b = scale · beta; K is normalised already and V = K when there are no values, whose gradients then add up in one sum.
Eq. (1) of AnoMem; online softmax: Milakov and Gimelshein 2018; recomputation from L: Dao et al. 2022, Algorithm 4.

There are many queries and few prototypes, so dK and dV are split over the queries: a block owns a tile of prototypes
and one of SPLIT spans of queries, and writes a float32 partial sum; the partial sums are added in a fixed order.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels import rows
from anomem.kernels.common import (
    LN2,
    LOG2E,
    block_of,
    cdiv,
    device_of,
    dot,
    load_rows,
    multiprocessors,
    round_to,
    split_loop,
    store_rows,
)
from anomem.kernels.memory import Memory, inverse_temperature, online_softmax
from anomem.kernels.normalize import normalize_rows, normalize_rows_backward
from anomem.kernels.specs import Spec, names, spec
from anomem.kernels.tiles import TABLE, Key, Tile
from anomem.kernels.tuning import Launched, Site, launch

# What `_prototype_sums` adds up: dK + dV of a tied memory, dK alone or dV alone. Separate values take two launches:
# with both sums in one block there is no tile without spills at d = 256.
TIED, KEYS, VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_lse(lse, rows, N):
    """L in units of log 2 [BLOCK]: inf outside, so that P is 0 there, and NaN for inf, as softmax gives it."""
    inside = rows < N
    row = tl.load(lse + rows, mask=inside, other=float("inf")) * LOG2E
    return tl.where(inside & (row == float("inf")), float("nan"), row)


@triton.jit
def _forward(
    query, keys, values, beta, out, lse, N, M, query_stride, scale,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = inverse_temperature(beta, scale) * LOG2E
    x = load_rows(query, n, query_stride, N, D, BLOCK_D).to(tl.float32)
    unit, _ = normalize_rows(x, NORMALIZE, D, BLOCK_D)
    q = round_to(unit, query.dtype.element_ty)  # [BLOCK_N, BLOCK_D]
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # running maximum of S, in units of log 2
    total = tl.zeros((BLOCK_N,), tl.float32)  # Σ exp2(S − shift)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    o = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = load_rows(keys, m, D, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION) * b  # [BLOCK_N, BLOCK_M]
        s = tl.where((m < M)[None, :], s, float("-inf"))
        p, top, total, shift, rescale = online_softmax(s, top, total)
        if values is None:
            v = k
        else:
            v = load_rows(values, m, DV, M, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        o = dot(round_to(p, v.dtype), v, o * rescale[:, None], PRECISION)
    store_rows(out, o / total[:, None], n, DV, N, DV, BLOCK_DV)
    tl.store(lse + n, (shift + tl.log2(total)) * LN2, mask=n < N)


@triton.jit
def _query_gradient(
    query, keys, values, beta, dout, dlse, lse, delta, dquery, dbeta, N, M, query_stride, scale,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = inverse_temperature(beta, scale)
    x = load_rows(query, n, query_stride, N, D, BLOCK_D).to(tl.float32)
    unit, factor = normalize_rows(x, NORMALIZE, D, BLOCK_D)
    q = round_to(unit, query.dtype.element_ty)  # [BLOCK_N, BLOCK_D]
    do = load_rows(dout, n, DV, N, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    row_lse = load_lse(lse, n, N)
    row_delta = tl.load(delta + n, mask=n < N, other=0.0)
    # db_n = Σ_m dS (S/b − c) + c dL_n for any c, as Σ_m dS = dL_n. With c = L/b the largest weight, where dS has
    # cancelled, is multiplied by almost nothing.
    centre = tl.where(b == 0.0, 0.0, row_lse * LN2 / b)
    along_beta = tl.zeros((BLOCK_N,), tl.float32)
    dq = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = load_rows(keys, m, D, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        if values is None:
            v = k
        else:
            v = load_rows(values, m, DV, M, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        qk = dot(q, tl.trans(k), zero, PRECISION)  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(qk * (b * LOG2E) - row_lse[:, None])
        dp = dot(do, tl.trans(v), zero, PRECISION)  # [BLOCK_N, BLOCK_M]
        ds = tl.where((m < M)[None, :], p * (dp - row_delta[:, None]), 0.0)
        if beta is not None:
            along_beta += tl.sum(ds * (qk - centre[:, None]), axis=1)
        dq = dot(round_to(ds, k.dtype), k, dq, PRECISION)
    # The rows are read and normalised again rather than kept in registers through the loop.
    x = load_rows(query, n, query_stride, N, D, BLOCK_D).to(tl.float32)
    unit, factor = normalize_rows(x, NORMALIZE, D, BLOCK_D)
    dx = normalize_rows_backward(dq * b, unit, factor, NORMALIZE, D, BLOCK_D)
    store_rows(dquery, dx, n, D, N, D, BLOCK_D)
    if beta is not None:
        if dlse is not None:
            along_beta += centre * tl.load(dlse + n, mask=n < N, other=0.0)
        along_beta = tl.where(n < N, along_beta, 0.0)  # outside, L is inf
        tl.store(dbeta + tl.program_id(0), tl.sum(along_beta, axis=0) * scale)


@triton.jit
def _prototype_sums(
    query, keys, values, beta, dout, lse, delta, partials, N, M, span, query_stride, scale,
    PART: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    b = inverse_temperature(beta, scale)
    W: tl.constexpr = DV if PART == VALUES else D
    BLOCK_W: tl.constexpr = BLOCK_DV if PART == VALUES else BLOCK_D
    k = load_rows(keys, m, D, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if PART == KEYS:
        v = load_rows(values, m, DV, M, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    else:
        v = k
    gradient = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q = load_rows(query, n, query_stride, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D], normalised
        do = load_rows(dout, n, DV, N, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = dot(k, tl.trans(q), zero, PRECISION) * (b * LOG2E)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s - load_lse(lse, n, N)[None, :])
        if PART != KEYS:
            gradient = dot(round_to(p, do.dtype), do, gradient, PRECISION)  # + Pᵀ dO
        if PART != VALUES:
            dp = dot(v, tl.trans(do), zero, PRECISION)  # [BLOCK_M, BLOCK_N]
            ds = p * (dp - tl.load(delta + n, mask=n < N, other=0.0)[None, :]) * b
            gradient = dot(round_to(ds, q.dtype), q, gradient, PRECISION)  # + b dSᵀ norm(Q)
    store_rows(partials + split.to(tl.int64) * M * W, gradient, m, W, M, W, BLOCK_W)


def forward(query: Tensor, memory: Memory, entry: Key, precision: str) -> tuple[Tensor, Tensor]:
    """One pass over the memory per tile of queries.

    Args:
        query: [N, d], N ≥ 1, unit inner stride.
        memory: see `Memory`.
        entry: of the tile table; tiles are BLOCK_N × BLOCK_M.
        precision: of float32 products.

    Returns:
        out [N, dv] in query's dtype, lse [N] float32.
    """
    keys, values, beta, scale, normalize = memory
    (count, d), dv = query.shape, memory.read.shape[1]
    out, lse = query.new_empty(count, dv), query.new_empty(count, dtype=torch.float32)

    def run(tile: Tile) -> Launched:
        return Launched(_forward[(cdiv(count, tile.rows),)](
            query, keys, values, beta, out, lse, count, keys.shape[0], query.stride(0), scale,
            normalize, precision, d, dv, tile.rows, tile.columns, block_of(d), block_of(dv), **tile.options,
        ))  # fmt: skip

    facts = {**_facts(query, memory), "normalize": normalize}
    with device_of(query):
        launch(Site(entry, facts, count, keys.shape[0], query.device), run)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    memory: Memory,
    out: Tensor,
    lse: Tensor,
    entries: tuple[Key, Key],
    precision: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by recomputation from lse.

    Args:
        dout: [N, dv], contiguous.
        dlse: [N] or None.
        query, memory, precision: as in `forward`.
        out, lse: what `forward` returned.
        entries: of the tile table: of the query gradient (BLOCK_N × BLOCK_M) and of the prototype sums (BLOCK_M ×
            BLOCK_N).

    Returns:
        dquery [N, d]; partial sums [SPLIT, M, d] of the gradient of the normalised keys and [SPLIT, M, dv] of the
        values' (None when tied), float32; dbeta (0-dim) or None.
    """
    keys, values, beta, scale, normalize = memory
    (count, d), prototypes, dv = query.shape, keys.shape[0], dout.shape[1]
    for_query, for_sums = entries
    facts = _facts(query, memory)
    delta = rows.row_constant(out, dout, dlse)
    widths = (d, dv)
    blocks = (block_of(d), block_of(dv))
    # dquery holds norm(query) until the query gradient takes its place: the prototype sums read it, once per tile of
    # prototypes, and need no second buffer of this size.
    dquery = query.new_empty(count, d)
    unit = rows.normalized(query, normalize, out=dquery) if normalize else query

    def prototype_sums(part: int, width: int) -> Tensor:
        def run(tile: Tile) -> Launched:
            tiles = cdiv(prototypes, tile.rows)
            parts, span = split_loop(count, tile.columns, tiles, multiprocessors(query))
            partials = query.new_empty(parts, prototypes, width, dtype=torch.float32)
            compiled = _prototype_sums[(tiles, parts)](
                unit, keys, values, beta, dout, lse, delta, partials, count, prototypes, span, unit.stride(0), scale,
                part, precision, *widths, tile.columns, tile.rows, *blocks, **tile.options,
            )  # fmt: skip
            return Launched(compiled, partials)

        return launch(Site(for_sums, {**facts, "part": part}, count, prototypes, query.device), run)

    def query_gradient(tile: Tile) -> Launched:
        blocks_of_queries = cdiv(count, tile.rows)
        along_beta = None if beta is None else query.new_empty(blocks_of_queries, dtype=torch.float32)
        compiled = _query_gradient[(blocks_of_queries,)](
            query, keys, values, beta, dout, dlse, lse, delta, dquery, along_beta,
            count, prototypes, query.stride(0), scale,
            normalize, precision, *widths, tile.rows, tile.columns, *blocks, **tile.options,
        )  # fmt: skip
        return Launched(compiled, along_beta)

    with device_of(query):
        if values is None:
            key_sums, value_sums = prototype_sums(TIED.value, d), None
        else:
            key_sums, value_sums = prototype_sums(KEYS.value, d), prototype_sums(VALUES.value, dv)
        facts = {**facts, "normalize": normalize, "dlse": dlse is not None}
        along_beta = launch(Site(for_query, facts, count, prototypes, query.device), query_gradient)
    return dquery, key_sums, value_sums, None if along_beta is None else along_beta.sum()


def _facts(query: Tensor, memory: Memory) -> dict[str, object]:
    """What every kernel of this file is compiled for."""
    widths = {"d": query.shape[1], "dv": memory.read.shape[1]}
    return {"dtype": query.dtype, **widths, "tied": memory.values is None, "beta": memory.beta is not None}


def specs(architecture: int) -> Iterator[Spec]:
    """Every tile of the table, tied and with separate values, with LayerNorm and a learned beta (the heaviest).

    At rows that fill their blocks, and at rows that leave a rest, which needs masks.
    """
    numbers = {"N": "i32", "M": "i32", "span": "i32", "query_stride": "i32", "scale": "fp32"}
    for (kernel, kind, block), tiles in TABLE.items():
        if kernel not in _KERNELS:
            continue
        function, outputs, variants = _KERNELS[kernel]
        wanted = names(function)
        row = "*bf16" if kind == "half" else "*fp32"
        arguments = dict.fromkeys(("query", "keys", "values", "out", "dout", "dquery"), row) | numbers
        arguments |= dict.fromkeys(("beta", "lse", *outputs), "*fp32")
        for tile, width, (variant, constants) in itertools.product(
            tiles[architecture], (block, block - 8), variants.items()
        ):
            swapped = kernel == "retrieve_prototype_sums"
            rows_and_columns = (tile.columns, tile.rows) if swapped else (tile.rows, tile.columns)
            known = {
                "NORMALIZE": 1, "PRECISION": "tf32" if kind == "tf32" else "ieee", "D": width, "DV": width,
                "BLOCK_N": rows_and_columns[0], "BLOCK_M": rows_and_columns[1], "BLOCK_D": block, "BLOCK_DV": block,
                **constants,
            }  # fmt: skip
            yield spec(
                f"{kernel} {variant} {kind} d{width}", function,
                {name: kind for name, kind in arguments.items() if name in wanted and name not in constants},
                {name: value for name, value in known.items() if name in wanted}, tile,
            )  # fmt: skip


_SEPARATE: dict[str, dict[str, object]] = {"tied": {"values": None}, "separate": {}}
_KERNELS = {
    "retrieve_forward": (_forward, (), _SEPARATE),
    "retrieve_query_gradient": (_query_gradient, ("dlse", "delta", "dbeta"), _SEPARATE),
    "retrieve_prototype_sums": (
        _prototype_sums,
        ("delta", "partials"),
        {
            "tied": {"PART": TIED.value, "values": None},
            "keys": {"PART": KEYS.value},
            "values": {"PART": VALUES.value},
        },
    ),
}
