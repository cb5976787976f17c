"""Retrieval by cuBLAS products over chunks of queries, for any d, dv and M, and for exact float32.

Per chunk of R queries, with S, dP, P, dS of size [R, M] in a scratch that stays in the L2 cache:

    forward    S = norm(Q) Kᵀ;   P = softmax(b S), L = logsumexp(b S)   one Triton pass;   O = P V
    backward   S = norm(Q) Kᵀ;   dP = dO Vᵀ;   P = softmax(b S), b dS = b P ∘ (dP − Σ_m P dP + dL)   one Triton pass
               dQ = (∂norm/∂Q)ᵀ b dS K;   dK += b dSᵀ norm(Q);   dV += Pᵀ dO

b = scale · beta. S and dP are float32 also for bfloat16 rows: 2⁻⁹ of a logit of 10 would be 2% of P. The chunks are
added in order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels import rows
from anomem.kernels.primitives import (
    LN2,
    LOG2E,
    Memory,
    cdiv,
    device_of,
    next_power_of_2,
    online_softmax,
    round_to,
    score_scale,
)

# Limit of S, dP, P and dS of one chunk together: about half the L2 cache of an A100 or H100.
SCRATCH_BYTES = 24 * 2**20
# Limit of norm(Q) and float32 dQ of one chunk together. Only a small memory with long rows reaches it: its scratch
# would have room for millions of queries.
ROW_BYTES = 64 * 2**20


@triton.jit
def row_sums(scores, dweights, queries, N, M, b, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """(shift, Σ_m exp2(b S − shift), Σ_m exp2(b S − shift) dP) of whole rows, each [BLOCK_N]; b in units of log 2.

    Without dweights (None) the third is zero.
    """
    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    weighted_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        offsets, mask = scratch_offsets(queries, start + tl.arange(0, BLOCK_M), N, M)
        score_tile = tl.load(scores + offsets, mask=mask, other=float("-inf"))  # [BLOCK_N, BLOCK_M]
        score_tile = tl.where(mask, score_tile * b, float("-inf"))
        exponentials, running_max, running_sum, shift, rescale = online_softmax(score_tile, running_max, running_sum)
        if dweights is not None:
            dweight_tile = tl.load(dweights + offsets, mask=mask, other=0.0)
            weighted_sum = weighted_sum * rescale + tl.sum(exponentials * dweight_tile, axis=1)
    return shift, running_sum, weighted_sum


@triton.jit
def scratch_offsets(queries, prototypes, N, M):
    """Offsets and mask [BLOCK_N, BLOCK_M] in the scratch [N, M], which has far fewer than 2³¹ elements."""
    return queries[:, None] * M + prototypes[None, :], (queries < N)[:, None] & (prototypes < M)[None, :]


@triton.jit(do_not_specialize=["N"])
def retrieve_chunked_softmax_kernel(
    scores,  # [N, M] float32
    weights,  # [N, M]; for float32 the same memory as `scores`
    beta,  # 0-dim, or None
    lse,  # [N] float32
    N,
    M,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """P and L of one chunk from its S. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b = score_scale(beta, scale) * LOG2E
    shift, total, _ = row_sums(scores, None, queries, N, M, b, BLOCK_N, BLOCK_M)
    for start in range(0, M, BLOCK_M):
        offsets, mask = scratch_offsets(queries, start + tl.arange(0, BLOCK_M), N, M)
        score_tile = tl.load(scores + offsets, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M]
        weight_tile = tl.exp2(score_tile * b - shift[:, None]) / total[:, None]
        tl.store(weights + offsets, round_to(weight_tile, weights.dtype.element_ty), mask=mask)
    tl.store(lse + queries, (shift + tl.log2(total)) * LN2, mask=queries < N)


@triton.jit(do_not_specialize=["N"])
def retrieve_chunked_softmax_backward_kernel(
    scores,  # [N, M] float32
    dweights,  # [N, M] float32
    weights,  # [N, M]; for float32 the same memory as `scores`
    dscores,  # [N, M]; for float32 the same memory as `dweights`
    beta,  # 0-dim, or None
    dlse,  # [N] float32, or None
    dbeta,  # [N] float32, Σ_m dS S of each row times scale; None without beta
    N,
    M,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """P, b dS and dbeta of one chunk from its S and dP. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b = score_scale(beta, scale)
    # The flash scheme computes P from L and delta from O. Here whole rows are at hand, which is more exact: rounding an
    # L of 200 would cost 1e-5 of P, and the error of a rounded O in delta would add up in Σ_m dS.
    shift, total, weighted_sum = row_sums(scores, dweights, queries, N, M, b * LOG2E, BLOCK_N, BLOCK_M)
    delta = weighted_sum / total  # [BLOCK_N], Σ_m P dP
    if dlse is not None:
        delta -= tl.load(dlse + queries, mask=queries < N, other=0.0)
    dbeta_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        offsets, mask = scratch_offsets(queries, start + tl.arange(0, BLOCK_M), N, M)
        score_tile = tl.load(scores + offsets, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M], without b
        dweight_tile = tl.load(dweights + offsets, mask=mask, other=0.0)
        weight_tile = tl.exp2(score_tile * (b * LOG2E) - shift[:, None]) / total[:, None]
        dscore_tile = weight_tile * (dweight_tile - delta[:, None])
        if beta is not None:
            dbeta_sum += tl.sum(tl.where(mask, dscore_tile * score_tile, 0.0), axis=1)
        tl.store(weights + offsets, round_to(weight_tile, weights.dtype.element_ty), mask=mask)
        tl.store(dscores + offsets, round_to(dscore_tile * b, dscores.dtype.element_ty), mask=mask)
    if beta is not None:
        tl.store(dbeta + queries, dbeta_sum * scale, mask=queries < N)


def forward(query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """out [N, dv] and lse [N]; arguments as in `retrieve_flash.forward`."""
    keys, _, beta, scale, normalize = memory
    values = memory.read_values
    count, prototypes = query.shape[0], keys.shape[0]
    out, lse = query.new_empty(count, values.shape[1]), query.new_empty(count, dtype=torch.float32)
    block_n, block_m = block_of_scores(prototypes)
    for chunk in chunks(count, prototypes, query.shape[1], query.dtype):
        scores = product(rows.normalized(query[chunk], normalize), keys.mT)  # [R, M] float32
        weights = scores if query.dtype == torch.float32 else scores.new_empty(scores.shape, dtype=query.dtype)
        with device_of(query):
            retrieve_chunked_softmax_kernel[(cdiv(scores.shape[0], block_n),)](
                scores, weights, beta, lse[chunk], scores.shape[0], prototypes, scale, block_n, block_m
            )
        torch.mm(weights, values, out=out[chunk])
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, memory: Memory
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by recomputation; results as of `retrieve_flash.backward`, with SPLIT = 1.

    Args:
        dout: [N, dv], contiguous.
        dlse: [N] or None.
        query, memory: as in `forward`.
    """
    keys, values, beta, scale, normalize = memory
    (count, d), prototypes = query.shape, keys.shape[0]
    in_place = query.dtype == torch.float32
    dquery = query.new_empty(count, d)
    key_sums = torch.zeros_like(keys, dtype=torch.float32)
    value_sums = key_sums if values is None else torch.zeros_like(values, dtype=torch.float32)
    dbeta = None if beta is None else query.new_empty(count, dtype=torch.float32)
    block_n, block_m = block_of_scores(prototypes)
    for chunk in chunks(count, prototypes, d, query.dtype):
        unit = rows.normalized(query[chunk], normalize)  # [R, d]
        scores, dweights = product(unit, keys.mT), product(dout[chunk], memory.read_values.mT)  # [R, M] float32
        weights = scores if in_place else scores.new_empty(scores.shape, dtype=query.dtype)
        dscores = dweights if in_place else scores.new_empty(scores.shape, dtype=query.dtype)
        with device_of(query):
            retrieve_chunked_softmax_backward_kernel[(cdiv(scores.shape[0], block_n),)](
                scores, dweights, weights, dscores, beta,
                None if dlse is None else dlse[chunk], None if dbeta is None else dbeta[chunk],
                scores.shape[0], prototypes, scale, block_n, block_m,
            )  # fmt: skip
        rows.normalized_backward(product(dscores, keys)[None], query[chunk], normalize, dquery[chunk])
        add_product(key_sums, dscores.mT, unit)
        add_product(value_sums, weights.mT, dout[chunk])
    return (
        dquery,
        key_sums[None],
        None if values is None else value_sums[None],
        None if dbeta is None else dbeta.sum(),
    )


def chunks(count: int, prototypes: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the queries, in order, whose scratch takes about SCRATCH_BYTES and whose rows at most ROW_BYTES.

    Args:
        count: N.
        prototypes: M.
        width: d.
        dtype: of the queries.
    """
    scratch_per_query = prototypes * (8 if dtype == torch.float32 else 12)  # bytes
    row_bytes = width * (4 + dtype.itemsize)
    size = max(1, min(SCRATCH_BYTES // scratch_per_query, ROW_BYTES // row_bytes) // 128) * 128
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def block_of_scores(prototypes: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_M) of the passes over the scratch: 2048 scores a block."""
    block_m = min(next_power_of_2(prototypes), 2048)
    return 2048 // block_m, block_m


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, [X, Y] · [Y, Z], without rounding the result to the operands' dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [X, Z] float32 += a b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += product(a, b)
