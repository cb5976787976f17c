"""Retrieval with whole rows in registers and an online softmax, for d, dv ≤ 256: nothing of size [N, M] is stored.

    forward    S = b norm(Q) Kᵀ,  P = softmax(S),  O = P V,  L = logsumexp(S)
    backward   dS = P ∘ (dO Vᵀ − delta),  delta_n = Σ_j O_nj dO_nj − dL_n
               dQ = (∂norm/∂Q)ᵀ b dS K,   dK = b dSᵀ norm(Q),   dV = Pᵀ dO,   db = Σ dS ∘ (norm(Q) Kᵀ)

b = scale · beta; K is already normalised. A tied memory has V = K, and the gradients of both add up in one sum.
The backward is for 16-bit rows: no tile of float32 rows is worth its registers.

A row of dS sums to dL_n, but rounded to 16 bits, and with a rounded O in delta, it misses that sum. The rest multiplies
the mean of K: where all prototypes are nearly the same dQ is what is left where they cancel, and would be the rest.
Eq. (1) of AnoMem; online softmax: Milakov and Gimelshein 2018; recomputation from L: Dao et al. 2022, Algorithm 4.

There are many queries and few prototypes, so dK and dV are split over the queries: a block owns a tile of prototypes
and one of SPLIT spans of queries, and writes a float32 partial sum. The partial sums are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels import rows
from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    LN2,
    Memory,
    block_of,
    cdiv,
    device_of,
    dot,
    load_normaliser,
    load_rows,
    multiprocessors,
    online_softmax,
    operand,
    precision,
    round_to,
    score_scale,
    sign_and_steepness,
    split_loop,
    store_rows,
    store_softmax_sums,
)
from anomem.kernels.rows import normalize_rows, normalize_rows_backward
from anomem.kernels.tile_search import Launched, Site, launch
from anomem.kernels.tile_table import MMA_SYNC, Entry, Tile, architecture_of

# The sum that a launch of `retrieve_flash_prototype_sums_kernel` makes: dK + dV of a tied memory, dK alone or dV alone.
# Separate values take two launches: with both sums in one block every tile of d = 256 spills.
TIED, KEYS, VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["N", "M"])
def retrieve_flash_forward_kernel(
    query,  # [N, d]
    keys,  # [M, d]
    values,  # [M, dv], or None when tied
    beta,  # 0-dim, or None
    out,  # [N, dv]
    lse,  # [N] float32
    normaliser,  # [N, 2] float32: see `store_softmax_sums`
    N,
    M,
    query_stride,
    scale,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One tile of queries against the whole memory. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    sign, steepness = sign_and_steepness(score_scale(beta, scale))
    raw = load_rows(query, queries, query_stride, N, D, BLOCK_D).to(tl.float32)
    unit, _ = normalize_rows(raw, NORMALIZE, D, BLOCK_D)
    query_tile = operand(unit, query.dtype.element_ty, PRECISION)  # [BLOCK_N, BLOCK_D]
    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # of sign · S
    running_sum = tl.zeros((BLOCK_N,), tl.float32)  # of exponentials
    shift = tl.zeros((BLOCK_N,), tl.float32)
    accumulator = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, M, BLOCK_M):
        prototypes = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        key_tile = load_rows(keys, prototypes, D, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        scores = dot(query_tile, tl.trans(key_tile), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        scores = tl.where((prototypes < M)[None, :], scores * sign, float("-inf"))  # [BLOCK_N, BLOCK_M]
        weights, running_max, running_sum, shift, rescale = online_softmax(scores, steepness, running_max, running_sum)
        if values is None:
            value_tile = key_tile
        else:
            value_tile = load_rows(values, prototypes, DV, M, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        weights = operand(weights, value_tile.dtype, PRECISION)
        accumulator = dot(weights, value_tile, accumulator * rescale[:, None], PRECISION)
    store_rows(out, accumulator / running_sum[:, None], queries, DV, N, DV, BLOCK_DV)
    store_softmax_sums(lse, normaliser, queries, N, shift, running_sum, steepness)


@triton.jit(do_not_specialize=["N", "M"])
def retrieve_flash_query_gradient_kernel(
    query,  # [N, d]
    keys,  # [M, d]
    keys_mean,  # [d] float32
    values,  # [M, dv], or None when tied
    beta,  # 0-dim, or None
    dout,  # [N, dv]
    dlse,  # [N] float32, or None
    normaliser,  # [N, 2] float32, from the forward
    delta,  # [N] float32
    dquery,  # [N, d], contiguous
    dbeta,  # [tiles of queries] float32, partial sums; None without beta
    N,
    M,
    query_stride,
    scale,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dQ of one tile of queries, and its part of dbeta. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b = score_scale(beta, scale)
    sign, steepness = sign_and_steepness(b)
    raw = load_rows(query, queries, query_stride, N, D, BLOCK_D).to(tl.float32)
    unit, factor = normalize_rows(raw, NORMALIZE, D, BLOCK_D)
    query_tile = round_to(unit, query.dtype.element_ty)  # [BLOCK_N, BLOCK_D]
    dout_tile = load_rows(dout, queries, DV, N, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    shift, log_total = load_normaliser(normaliser, queries, N)  # [BLOCK_N]
    row_delta = tl.load(delta + queries, mask=queries < N, other=0.0)
    # db_n = Σ_m dS (S/b − c) + c dL_n for any c, since Σ_m dS = dL_n. With c = L/b the factor of the largest weight,
    # where dS has cancelled, is almost zero.
    centre = tl.where(b == 0.0, 0.0, sign * shift + log_total * LN2 / b)
    dbeta_sum = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)  # of rounded dS
    accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # dS K
    for start in range(0, M, BLOCK_M):
        prototypes = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        key_tile = load_rows(keys, prototypes, D, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        if values is None:
            value_tile = key_tile
        else:
            value_tile = load_rows(values, prototypes, DV, M, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        inner = dot(query_tile, tl.trans(key_tile), zero, "ieee")  # [BLOCK_N, BLOCK_M], S / b
        weights = tl.exp2((inner * sign - shift[:, None]) * steepness - log_total[:, None])
        dweights = dot(dout_tile, tl.trans(value_tile), zero, "ieee")  # [BLOCK_N, BLOCK_M]
        dscores = tl.where((prototypes < M)[None, :], weights * (dweights - row_delta[:, None]), 0.0)
        if beta is not None:
            dbeta_sum += tl.sum(dscores * (inner - centre[:, None]), axis=1)
        rounded = round_to(dscores, key_tile.dtype)
        total += tl.sum(rounded.to(tl.float32), axis=1)
        accumulator = dot(rounded, key_tile, accumulator, "ieee")
    mean = tl.load(keys_mean + tl.arange(0, BLOCK_D), mask=tl.arange(0, BLOCK_D) < D, other=0.0)  # [BLOCK_D]
    missing = -total
    if dlse is not None:
        missing += tl.load(dlse + queries, mask=queries < N, other=0.0)
    accumulator += missing[:, None] * mean[None, :]
    # Rows are loaded and normalised again, so that they occupy no registers during the loop.
    raw = load_rows(query, queries, query_stride, N, D, BLOCK_D).to(tl.float32)
    unit, factor = normalize_rows(raw, NORMALIZE, D, BLOCK_D)
    gradient = normalize_rows_backward(accumulator * b, unit, factor, NORMALIZE, D, BLOCK_D)
    store_rows(dquery, gradient, queries, D, N, D, BLOCK_D)
    if beta is not None:
        if dlse is not None:
            dbeta_sum += centre * tl.load(dlse + queries, mask=queries < N, other=0.0)
        dbeta_sum = tl.where(queries < N, dbeta_sum, 0.0)  # outside, L is inf
        tl.store(dbeta + tl.program_id(0), tl.sum(dbeta_sum, axis=0) * scale)


@triton.jit(do_not_specialize=["N", "M", "span"])
def retrieve_flash_prototype_sums_kernel(
    query,  # [N, d], already normalised
    keys,  # [M, d]
    values,  # [M, dv], or None when tied
    beta,  # 0-dim, or None
    dout,  # [N, dv]
    normaliser,  # [N, 2] float32, from the forward
    delta,  # [N] float32
    partials,  # [SPLIT, M, d] float32; [SPLIT, M, dv] for VALUES
    N,
    M,
    span,
    query_stride,
    scale,
    PART: tl.constexpr,
    TWO_SUMS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The sum named by PART for one tile of prototypes over one span of queries. Grid: [tiles of prototypes, SPLIT].

    TWO_SUMS: the two products of a tied memory are added after the loop. On sm_100 Triton 3.6 to 3.8 may lose one of
    two products that add to the same accumulator (triton#10821); there accumulators take no registers.
    """
    prototypes = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    split = tl.program_id(1)
    b = score_scale(beta, scale)
    sign, steepness = sign_and_steepness(b)
    WIDTH: tl.constexpr = DV if PART == VALUES else D
    BLOCK_WIDTH: tl.constexpr = BLOCK_DV if PART == VALUES else BLOCK_D
    key_tile = load_rows(keys, prototypes, D, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if PART == KEYS:
        value_tile = load_rows(values, prototypes, DV, M, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    else:
        value_tile = key_tile
    accumulator = tl.zeros((BLOCK_M, BLOCK_WIDTH), tl.float32)
    if TWO_SUMS:
        second_sum = tl.zeros((BLOCK_M, BLOCK_WIDTH), tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, N), BLOCK_N):
        queries = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        query_tile = load_rows(query, queries, query_stride, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        dout_tile = load_rows(dout, queries, DV, N, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = dot(key_tile, tl.trans(query_tile), zero, "ieee")  # [BLOCK_M, BLOCK_N], S / b
        shift, log_total = load_normaliser(normaliser, queries, N)
        weights = tl.exp2((scores * sign - shift[None, :]) * steepness - log_total[None, :])
        if PART != KEYS:
            # + Pᵀ dO
            accumulator = dot(round_to(weights, dout_tile.dtype), dout_tile, accumulator, "ieee")
        if PART != VALUES:
            dweights = dot(value_tile, tl.trans(dout_tile), zero, "ieee")  # [BLOCK_M, BLOCK_N]
            row_delta = tl.load(delta + queries, mask=queries < N, other=0.0)
            dscores = weights * (dweights - row_delta[None, :]) * b
            # + b dSᵀ norm(Q)
            dscores = round_to(dscores, query_tile.dtype)
            if TWO_SUMS:
                second_sum = dot(dscores, query_tile, second_sum, "ieee")
            else:
                accumulator = dot(dscores, query_tile, accumulator, "ieee")
    if TWO_SUMS:
        accumulator += second_sum
    store_rows(partials + split.to(tl.int64) * M * WIDTH, accumulator, prototypes, WIDTH, M, WIDTH, BLOCK_WIDTH)


def forward(query: Tensor, memory: Memory, entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the memory per tile of queries.

    Args:
        query: [N, d], N ≥ 1, unit inner stride.
        memory: see `Memory`; keys and values are rounded to TF32 if products are.
        entry: of the tile table; tiles are BLOCK_N × BLOCK_M.

    Returns:
        out [N, dv] in query's dtype, lse [N] float32, normaliser [N, 2] float32.
    """
    keys, values, beta, scale, normalize = memory
    (count, d), dv = query.shape, memory.read_values.shape[1]
    # With more stages ptxas serialises the products of such values on sm_90 (C7515).
    unstaged = block_of(dv) <= 64 and architecture_of(query.device) == 90
    out = query.new_empty(count, dv)
    lse, normaliser = (query.new_empty(count, *width, dtype=torch.float32) for width in ((), (2,)))

    def run(tile: Tile) -> Launched:
        tile = tile._replace(stages=1) if unstaged else tile
        compiled = launch_kernel(retrieve_flash_forward_kernel, (cdiv(count, tile.rows),),
            query, keys, values, beta, out, lse, normaliser, count, keys.shape[0], query.stride(0), scale,
            NORMALIZE=normalize, PRECISION=precision(query.dtype), D=d, DV=dv, BLOCK_N=tile.rows, BLOCK_M=tile.columns,
            BLOCK_D=block_of(d), BLOCK_DV=block_of(dv), **tile.options,
        )  # fmt: skip
        return Launched(compiled)

    facts = {**_facts(query, memory), "normalize": normalize}
    with device_of(query):
        launch(Site(entry, facts, count, keys.shape[0], query.device), run)
    return out, lse, normaliser


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    memory: Memory,
    out: Tensor,
    normaliser: Tensor,
    entries: tuple[Entry, Entry],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by recomputation from the normaliser.

    Args:
        dout: [N, dv], contiguous.
        dlse: [N] or None.
        query, memory: as in `forward`, of 16-bit numbers.
        out, normaliser: the results of `forward`.
        entries: of the tile table: of the query gradient (BLOCK_N × BLOCK_M) and of the prototype sums (BLOCK_M ×
            BLOCK_N).

    Returns:
        dquery [N, d]; partial sums [SPLIT, M, d] of the gradient of the normalised keys and [SPLIT, M, dv] of the
        values (None when tied), float32; dbeta (0-dim) or None.
    """
    keys, values, beta, scale, normalize = memory
    (count, d), prototypes, dv = query.shape, keys.shape[0], dout.shape[1]
    query_entry, sums_entry = entries
    delta = rows.row_constant(out, dout, dlse)
    sizes = {"D": d, "DV": dv, "BLOCK_D": block_of(d), "BLOCK_DV": block_of(dv)}
    # dquery first holds norm(query) for the prototype sums, which read it once per tile of prototypes. The query
    # gradient then overwrites it, so no second buffer of this size is needed.
    dquery = query.new_empty(count, d)
    unit = rows.normalized(query, normalize, out=dquery) if normalize else query
    keys_mean = keys.mean(0, dtype=torch.float32)
    architecture = architecture_of(query.device)
    two_sums = values is None and architecture == 100
    # Single 16-bit numbers are not copied to shared memory beside the products: stages would take registers.
    unstaged = architecture in MMA_SYNC and (d % 2 == 1 or dv % 2 == 1)

    def prototype_sums(part: int, width: int) -> Tensor:
        def run(tile: Tile) -> Launched:
            tile = tile._replace(stages=1) if unstaged else tile
            tiles = cdiv(prototypes, tile.rows)
            parts, span = split_loop(count, tile.columns, tiles, multiprocessors(query))
            partials = query.new_empty(parts, prototypes, width, dtype=torch.float32)
            compiled = launch_kernel(retrieve_flash_prototype_sums_kernel, (tiles, parts),
                unit, keys, values, beta, dout, normaliser, delta, partials,
                count, prototypes, span, unit.stride(0), scale,
                PART=part, TWO_SUMS=two_sums, BLOCK_N=tile.columns, BLOCK_M=tile.rows, **sizes, **tile.options,
            )  # fmt: skip
            return Launched(compiled, partials)

        facts = {**_facts(query, memory), "part": part}
        return launch(Site(sums_entry, facts, count, prototypes, query.device), run)

    def query_gradient(tile: Tile) -> Launched:
        tiles = cdiv(count, tile.rows)
        dbeta = None if beta is None else query.new_empty(tiles, dtype=torch.float32)
        compiled = launch_kernel(retrieve_flash_query_gradient_kernel, (tiles,),
            query, keys, keys_mean, values, beta, dout, dlse, normaliser, delta, dquery, dbeta,
            count, prototypes, query.stride(0), scale,
            NORMALIZE=normalize, BLOCK_N=tile.rows, BLOCK_M=tile.columns, **sizes, **tile.options,
        )  # fmt: skip
        return Launched(compiled, dbeta)

    with device_of(query):
        if values is None:
            key_sums, value_sums = prototype_sums(TIED.value, d), None
        else:
            key_sums, value_sums = prototype_sums(KEYS.value, d), prototype_sums(VALUES.value, dv)
        facts = {**_facts(query, memory), "normalize": normalize, "dlse": dlse is not None}
        dbeta = launch(Site(query_entry, facts, count, prototypes, query.device), query_gradient)
    return dquery, key_sums, value_sums, None if dbeta is None else dbeta.sum()


def _facts(query: Tensor, memory: Memory) -> dict[str, object]:
    """The facts that every kernel of this file is compiled for."""
    widths = {"d": query.shape[1], "dv": memory.read_values.shape[1]}
    return {"dtype": query.dtype, **widths, "tied": memory.values is None, "beta": memory.beta is not None}
