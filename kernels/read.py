"""The read of a filled memory: cuBLAS products over chunks of queries and fused passes, for any d and M.

    s = b norm(q)·norm(k) + bias;   E = exp(s − max s) over all prototypes or over the k largest s;   r = E K / Σ E

Per chunk of R queries the scores [R, M] lie in a scratch that stays in the L2 cache (`retrieve_chunked`) and become E.
The k largest are selected first (`nearest_select_kernel`); E is 0 elsewhere. Rows are normalised in float32, whatever
their dtype: 2⁻⁹ of a score of 10 would be 2% of E.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels import rows
from anomem.kernels.launching import launch_kernel
from anomem.kernels.nearest import memory_scores, select
from anomem.kernels.primitives import (
    LOG2E,
    block_of,
    cdiv,
    device_of,
    finite_shift,
    load_rows,
    score_scale,
    store_rows,
)
from anomem.kernels.retrieve_chunked import block_of_scores, chunks, product, scratch_offsets


@triton.jit(do_not_specialize=["N"])
def read_softmax_kernel(
    scores,  # [N, M] float32, q·k; becomes E
    bias,  # [M] float32, or None
    beta,  # 0-dim, or None
    least,  # [N] float32, the smallest score that is read, or None
    least_index,  # [N] int64, its index
    total,  # [N] float32, Σ E
    entropy,  # [N] float32
    lse,  # [N] float32
    N,
    M,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """E, its sum, the entropy of E / Σ E and the log-sum-exp of one chunk. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b = score_scale(beta, scale)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in range(0, M, BLOCK_M):
        s, mask = memory_scores(scores, bias, queries, start + tl.arange(0, BLOCK_M), N, M, b)
        largest = tl.maximum(largest, tl.max(tl.where(mask, s, float("-inf")), axis=1))
    shift = finite_shift(largest)  # [BLOCK_N]
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    weighted_sum = tl.zeros((BLOCK_N,), tl.float32)  # Σ E log E
    for start in range(0, M, BLOCK_M):
        prototypes = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        s, mask = memory_scores(scores, bias, queries, prototypes, N, M, b)
        shifted = s - shift[:, None]
        exponentials = tl.exp2(shifted * LOG2E)
        if least is not None:
            bound = tl.load(least + queries, mask=queries < N, other=0.0)[:, None]
            bound_index = tl.load(least_index + queries, mask=queries < N, other=0)[:, None]
            rank = tl.where(s == s, s, float("-inf"))  # NaN comes last
            taken = (rank > bound) | ((rank == bound) & (prototypes[None, :] <= bound_index))
            exponentials = tl.where(taken, exponentials, 0.0)
        exponentials = tl.where(mask, exponentials, 0.0)
        running_sum += tl.sum(exponentials, axis=1)
        weighted_sum += tl.sum(tl.where(exponentials == 0.0, 0.0, exponentials * shifted), axis=1)
        offsets, mask = scratch_offsets(queries, prototypes, N, M)
        tl.store(scores + offsets, exponentials, mask=mask)
    log_sum = tl.log(running_sum)
    tl.store(total + queries, running_sum, mask=queries < N)
    tl.store(entropy + queries, log_sum - weighted_sum / running_sum, mask=queries < N)
    tl.store(lse + queries, shift + log_sum, mask=queries < N)


@triton.jit(do_not_specialize=["N"])
def read_finish_kernel(
    query,  # [N, d] float32, normalised
    read,  # [N, d] float32, E K
    total,  # [N] float32
    out,  # [N, d]
    residual,  # [N] float32
    cosine,  # [N] float32
    N,
    DEVIATION: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r = read / total, or q − r; |q − r| and 1 − cos(q, r). Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    q = load_rows(query, queries, D, N, D, BLOCK_D)  # [BLOCK, BLOCK_D]
    r = load_rows(read, queries, D, N, D, BLOCK_D) / tl.load(total + queries, mask=queries < N, other=1.0)[:, None]
    difference = q - r
    length, read_length = tl.sqrt_rn(tl.sum(q * q, axis=1)), tl.sqrt_rn(tl.sum(r * r, axis=1))  # [BLOCK]
    tl.store(residual + queries, tl.sqrt_rn(tl.sum(difference * difference, axis=1)), mask=queries < N)
    lengths = tl.maximum(length, 1e-12) * tl.maximum(read_length, 1e-12)
    tl.store(cosine + queries, 1.0 - tl.sum(q * r, axis=1) / lengths, mask=queries < N)
    store_rows(out, difference if DEVIATION else r, queries, D, N, D, BLOCK_D)


def read(
    query: Tensor,
    keys: Tensor,
    beta: Tensor | None,
    scale: float,
    bias: Tensor | None,
    normalize: int,
    top_k: int,
    nearest: bool,
    deviation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Read every bank of a memory.

    Args:
        query: [L, N, d] or [1, N, d], unit inner stride.
        keys: [L, M, d], contiguous.
        beta: 0-dim, loaded by the kernel, or None.
        scale: factor on beta; beta itself when that is None.
        bias: [L, M] float32, contiguous, or None.
        normalize: 0 none, 1 layer, 2 l2.
        top_k: prototypes that are read; 0 for all.
        nearest: whether to find the nearest prototype.
        deviation: whether to give norm(q) − read.

    Returns:
        out [L, N, d] in query's dtype; residual, cosine, distance, index (int64), entropy and lse [L, N] float32.
        Without `nearest`, distance and index are [L, 0].
    """
    banks, count = keys.shape[0], query.shape[1]

    def numbers(given: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty(banks, count if given else 0, dtype=dtype)

    result = (
        query.new_empty(banks, count, query.shape[2]), numbers(), numbers(), numbers(nearest),
        numbers(nearest, torch.int64), numbers(), numbers(),
    )  # fmt: skip
    for bank in range(banks):
        _read_bank(
            query[bank if query.shape[0] > 1 else 0], keys[bank], beta, scale, None if bias is None else bias[bank],
            normalize, top_k, nearest, deviation, tuple(x[bank] for x in result),
        )  # fmt: skip
    return result


def _read_bank(
    query: Tensor,
    keys: Tensor,
    beta: Tensor | None,
    scale: float,
    bias: Tensor | None,
    normalize: int,
    top_k: int,
    nearest: bool,
    deviation: bool,
    result: tuple[Tensor, ...],
) -> None:
    out, residual, cosine, distance, index, entropy, lse = result
    (count, width), prototypes = query.shape, keys.shape[0]
    keys = rows.normalized(keys.float(), normalize)  # [M, d] float32
    lengths = keys.square().sum(dim=1) / -2 if nearest else None
    block_n, block_m = block_of_scores(prototypes)
    block = rows.rows_per_block(width)
    for chunk in chunks(count, prototypes, width, torch.float32, query.device):
        unit = rows.normalized(query[chunk].float(), normalize)  # [R, d] float32
        scores = product(unit, keys.mT)  # [R, M]
        length = scores.shape[0]
        if lengths is not None:
            select(scores, lengths, None, 1.0, unit, keys, index=index[chunk, None], distance=distance[chunk, None])
        least = least_index = None
        if top_k > 0:
            largest, places = scores.new_empty(length, top_k), index.new_empty(length, top_k)
            select(scores, bias, beta, scale, unit, keys, index=places, value=largest)
            least, least_index = largest[:, -1].contiguous(), places[:, -1].contiguous()
        total = scores.new_empty(length)
        with device_of(query):
            launch_kernel(read_softmax_kernel, (cdiv(length, block_n),),
                scores, bias, beta, least, least_index, total, entropy[chunk], lse[chunk],
                length, prototypes, scale, block_n, block_m,
            )  # fmt: skip
            launch_kernel(read_finish_kernel, (cdiv(length, block),),
                unit, torch.mm(scores, keys), total, out[chunk], residual[chunk], cosine[chunk],
                length, deviation, width, block, block_of(width),
            )  # fmt: skip
