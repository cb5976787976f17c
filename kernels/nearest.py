"""The nearest prototypes and greedy k-center: cuBLAS products over chunks of rows, one selecting pass, for any d and M.

    s = b x·m + offset;   for the nearest prototypes b = 1 and offset = −|m|²/2, since |x − m|² = |x|² − 2 s

Per chunk of R rows x·m [R, M] lies in a scratch that stays in the L2 cache (`retrieve_chunked`). The pass takes the
largest s of each row, then the next after it, k times: of equal numbers the lowest index, and NaN last. What was taken
gets its distance as the sum of squared differences.

Greedy k-center (Gonzalez 1985) is one launch per centre. Each block finds the farthest of its rows; the next launch
takes the farthest of these, so the host never waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    block_of,
    cdiv,
    device_of,
    load_slice,
    next_power_of_2,
    score_scale,
)
from anomem.kernels.retrieve_chunked import block_of_scores, chunks, product, scratch_offsets

MOST_BLOCKS = 1024
"""Of a launch of k-center."""


@triton.jit
def memory_scores(scores, offset, queries, prototypes, N, M, b):
    """(s, mask), [BLOCK_N, BLOCK_M] each: s = b x·m + offset, with the same rounding wherever it is computed."""
    offsets, mask = scratch_offsets(queries, prototypes, N, M)
    s = tl.load(scores + offsets, mask=mask, other=0.0)
    if offset is None:
        s = s * b
    else:
        added = tl.load(offset + prototypes, mask=prototypes < M, other=0.0)
        s = tl.fma(s, tl.zeros_like(s) + b, tl.broadcast_to(added[None, :], s.shape))
    return s, mask


@triton.jit(do_not_specialize=["N", "K"])
def nearest_select_kernel(
    scores,  # [N, M] float32, x·m
    offset,  # [M] float32, or None
    beta,  # 0-dim, or None
    x,  # [N, d]
    prototypes,  # [M, d], contiguous
    value,  # [N, K] float32
    index,  # [N, K] int64
    distance,  # [N, K] float32, or None
    N,
    M,
    x_stride,
    scale,
    K,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The K largest scores of each row in order, and the distances of their prototypes. Grid: [tiles of rows]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b = score_scale(beta, scale)
    last = tl.full((BLOCK_N,), float("inf"), tl.float32)  # the score that was taken last
    last_index = tl.full((BLOCK_N,), -1, tl.int32)
    for i in range(K):
        best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        best_index = tl.full((BLOCK_N,), 2147483647, tl.int32)
        for start in range(0, M, BLOCK_M):
            columns = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            s, mask = memory_scores(scores, offset, rows, columns, N, M, b)
            s = tl.where(s == s, s, float("-inf"))
            after = (s < last[:, None]) | ((s == last[:, None]) & (columns[None, :] > last_index[:, None]))
            s = tl.where(mask & after, s, float("-inf"))
            top = tl.max(s, axis=1)  # [BLOCK_N]
            found = mask & after & (s == top[:, None])
            top_index = tl.min(tl.where(found, columns[None, :], 2147483647), axis=1)
            better = (top > best) | ((top == best) & (top_index < best_index))
            best, best_index = tl.where(better, top, best), tl.where(better, top_index, best_index)
        place = rows.to(tl.int64) * K + i
        tl.store(value + place, best, mask=rows < N)
        tl.store(index + place, best_index.to(tl.int64), mask=rows < N)
        if distance is not None:
            squares = tl.zeros((BLOCK_N,), tl.float32)
            for begin in range(0, D, BLOCK_D):
                features = begin + tl.arange(0, BLOCK_D)
                here = load_slice(x, rows, features, x_stride, N, D).to(tl.float32)  # [BLOCK_N, BLOCK_D]
                chosen = load_slice(prototypes, best_index, features, D, M, D).to(tl.float32)
                squares += tl.sum((here - chosen) * (here - chosen), axis=1)
            tl.store(distance + place, squares, mask=rows < N)
        last, last_index = best, best_index


@triton.jit(do_not_specialize=["N", "step", "first", "span"])
def nearest_center_kernel(
    x,  # [N, d]
    distance,  # [N] float32, overwritten
    before,  # [2, BLOCKS] float32 and
    before_index,  # [2, BLOCKS] int64, the farthest row of each block: of the last step, and of this one
    chosen,  # [count] int64
    N,
    x_stride,
    step,
    first,
    span,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Chooses centre number `step` and lowers the distances to it. Grid: at most BLOCKS, `span` rows each."""
    block = tl.program_id(0)
    blocks = tl.arange(0, BLOCKS)  # [BLOCKS]
    read, write = (step + 1) % 2 * BLOCKS, step % 2 * BLOCKS
    farthest = tl.load(before + read + blocks)
    candidates = tl.load(before_index + read + blocks)
    centre = tl.min(tl.where(farthest == tl.max(farthest, axis=0), candidates, N), axis=0)
    if step == 0:
        centre = centre * 0 + first
    if block == 0:
        tl.store(chosen + step, centre)
    best = tl.full((), float("-inf"), tl.float32)
    best_index = centre * 0
    for start in range(0, span, BLOCK_N):
        rows = block * span + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        inside = rows < N
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for begin in range(0, D, BLOCK_D):
            features = begin + tl.arange(0, BLOCK_D)
            here = load_slice(x, rows, features, x_stride, N, D).to(tl.float32)  # [BLOCK_N, BLOCK_D]
            there = tl.load(x + centre * x_stride + features, mask=features < D, other=0.0).to(tl.float32)
            squares += tl.sum((here - there[None, :]) * (here - there[None, :]), axis=1)
        known = tl.load(distance + rows, mask=inside, other=float("-inf"))
        lowered = tl.where(squares < known, squares, known)
        # NaN is never farther than another row that is not chosen.
        lowered = tl.where(squares == squares, lowered, tl.minimum(known, -0.5))
        lowered = tl.where(rows == centre, -1.0, lowered)  # a centre is chosen once
        tl.store(distance + rows, lowered, mask=inside)
        lowered = tl.where(inside, lowered, float("-inf"))
        top = tl.max(lowered, axis=0)
        top_index = tl.min(tl.where(inside & (lowered == top), rows.to(tl.int64), N), axis=0)
        best_index = tl.where(top > best, top_index, best_index)
        best = tl.where(top > best, top, best)
    tl.store(before + write + block, best)
    tl.store(before_index + write + block, best_index)


def nearest(x: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest prototypes of each row and bank.

    Args:
        x: [L, N, d] or [1, N, d], unit inner stride.
        prototypes: [L, M, d], contiguous.
        k: from 1 to M.

    Returns:
        Squared distances [L, N, k] float32, in order, and indices [L, N, k] int64.
    """
    shape = prototypes.shape[0], x.shape[1], k
    distance = x.new_empty(shape, dtype=torch.float32)
    index = x.new_empty(shape, dtype=torch.int64)
    for bank, of_bank in enumerate(prototypes):
        rows = x[bank if x.shape[0] > 1 else 0]
        offset = of_bank.float().square().sum(dim=1) / -2
        for chunk in chunks(x.shape[1], of_bank.shape[0], x.shape[2], x.dtype, x.device):
            part = rows[chunk]
            select(
                product(part, of_bank.mT), offset, None, 1.0, part, of_bank,
                index=index[bank, chunk], distance=distance[bank, chunk],
            )  # fmt: skip
    if k > 1:  # scores are rounded elsewhere than distances are
        index, order = index.sort(dim=2)
        distance, order = distance.gather(2, order).sort(dim=2, stable=True)
        index = index.gather(2, order)
    return distance, index


def select(
    scores: Tensor,
    offset: Tensor | None,
    beta: Tensor | None,
    scale: float,
    x: Tensor,
    prototypes: Tensor,
    *,
    index: Tensor,
    value: Tensor | None = None,
    distance: Tensor | None = None,
) -> None:
    """Write indices, scores and distances of the largest scores.

    Args:
        scores: x·m [N, M] float32.
        offset: [M] float32, or None.
        beta: 0-dim, or None.
        scale: factor on beta; beta itself when that is None.
        x: [N, d], unit inner stride.
        prototypes: [M, d], contiguous.
        index: [N, k] int64, written.
        value: [N, k] float32, written; not wanted when None.
        distance: [N, k] float32, written; not wanted when None.
    """
    count, prototypes_count = scores.shape
    k = index.shape[1]
    block_n, block_m = block_of_scores(prototypes_count)
    value = scores.new_empty(count, k) if value is None else value
    width = x.shape[1]
    with device_of(x):
        launch_kernel(nearest_select_kernel, (cdiv(count, block_n),),
            scores, offset, beta, x, prototypes, value, index, distance,
            count, prototypes_count, x.stride(0), scale, k,
            D=width, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_D=min(block_of(width), max(2048 // block_n, 16)),
        )  # fmt: skip


def k_center(x: Tensor, count: int, first: int) -> Tensor:
    """Indices of greedy k-center; see the top of the file.

    Args:
        x: [N, d], unit inner stride.
        count: of centres, from 1 to N.
        first: index of the first.

    Returns:
        [count] int64.
    """
    rows, width = x.shape
    block_d = min(block_of(width), 256)
    block_n = max(2048 // block_d, 1)
    span = cdiv(cdiv(rows, block_n), MOST_BLOCKS) * block_n
    blocks = cdiv(rows, span)
    padded = next_power_of_2(blocks)
    distance = x.new_full((rows,), torch.inf, dtype=torch.float32)
    before = x.new_full((2, padded), -torch.inf, dtype=torch.float32)
    before_index = x.new_full((2, padded), 0, dtype=torch.int64)
    chosen = x.new_empty(count, dtype=torch.int64)
    with device_of(x):
        for step in range(count):
            launch_kernel(nearest_center_kernel, (blocks,),
                x, distance, before, before_index, chosen, rows, x.stride(0), step, first, span,
                D=width, BLOCKS=padded, BLOCK_N=block_n, BLOCK_D=block_d,
            )  # fmt: skip
    return chosen
