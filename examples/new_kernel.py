"""A kernel with a new epilogue: the cosine of each query and what the memory returns, without writing the retrieval.

Read `kernels/retrieve_resident.py` first: a program loads a tile of queries, walks over the prototypes with an online
softmax, and stores the mean of the values. Here the last step is another one. A kernel comes with a reference in plain
PyTorch and a test against float64; `python examples/new_kernel.py` runs it, without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import triton
import triton.language as tl
from torch import Tensor

from anomem.reference import hopfield_retrieve


def reference(query: Tensor, keys: Tensor, beta: float) -> Tensor:
    """cos(q, softmax(beta q Kᵀ) K): query [N, d], keys [M, d] -> [N]."""
    out = hopfield_retrieve(query, keys, beta=beta, normalize="none").out
    return torch.cosine_similarity(query, out, dim=-1)


@triton.jit
def _cosine(query, keys, out, N, M, D: tl.constexpr, beta, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    features = tl.arange(0, D)
    inside = rows[:, None] < N
    q = tl.load(query + rows[:, None] * D + features[None], mask=inside, other=0.0).to(tl.float32)  # [BLOCK_N, D]
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    read = tl.zeros([BLOCK_N, D], tl.float32)
    for start in range(0, M, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        there = columns[:, None] < M
        k = tl.load(keys + columns[:, None] * D + features[None], mask=there, other=0.0).to(tl.float32)
        scores = beta * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        scores = tl.where(columns[None] < M, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, axis=1))
        scale, weights = tl.exp(highest - new), tl.exp(scores - new[:, None])
        total = total * scale + tl.sum(weights, axis=1)
        read = read * scale[:, None] + tl.dot(weights, k, input_precision="ieee")
        highest = new
    # The epilogue. A cosine does not depend on the length of `read`, so it is not divided by `total`.
    lengths = tl.sqrt(tl.sum(q * q, axis=1)) * tl.sqrt(tl.sum(read * read, axis=1))
    tl.store(out + rows, tl.sum(q * read, axis=1) / tl.maximum(lengths, 1e-12), mask=rows < N)


def cosine_to_memory(query: Tensor, keys: Tensor, beta: float) -> Tensor:
    """As `reference`; d is a power of two from 16 on."""
    (count, features), out = query.shape, query.new_empty(query.shape[0], dtype=torch.float32)
    grid = (triton.cdiv(count, 16),)
    _cosine[grid](query.contiguous(), keys.contiguous(), out, count, keys.shape[0], features, beta, 16, 16)
    return out


def main() -> float:
    """The test: the error against float64 is at most twice that of plain PyTorch, plus rounding. Returns the error."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, keys = torch.randn(50, 32, device=device), torch.randn(37, 32, device=device)  # no multiples of the tiles
    exact = reference(query.double(), keys.double(), 0.5)
    error = (cosine_to_memory(query, keys, 0.5) - exact).abs().max().item()
    plain = (reference(query, keys, 0.5) - exact).abs().max().item()
    assert error <= 2 * plain + 1e-6, (error, plain)
    print(f"error {error:.1e}, of plain PyTorch {plain:.1e}")
    return error


if __name__ == "__main__":
    main()
