"""Plain PyTorch beyond the reference: `torch.compile`, batched NT-Xent by `baddbmm`, chunking in Python.

Python chunks: blocks of rows under `torch.utils.checkpoint`, so that only one block's scores are alive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.case import Case, Function, Implementation
from benchmarks.operators import OPERATORS
from benchmarks.operators_contrast import TEMPERATURE

CHUNK = 2048
"""Rows of a block."""


def compiled(case: Case, device: str) -> Function:
    """The reference with static sizes, compiled at its first call."""
    function: Function = torch.compile(OPERATORS[case.operator].ours("reference"), dynamic=False, fullgraph=True)
    return function


def batched_nt_xent(case: Case, device: str) -> Function:
    """One `baddbmm` adds the mask of the diagonal to the similarities of all groups; mask and targets are made once."""
    groups, batch = case.dims["G"], case.dims["B"]
    mask = torch.zeros(2 * batch, 2 * batch, dtype=case.torch_dtype, device=device).fill_diagonal_(-torch.inf)
    target = torch.arange(2 * batch, device=device).roll(batch).repeat(groups)

    def loss(z: Tensor, z_pair: Tensor) -> Tensor:
        unit = F.normalize(torch.cat([z, z_pair], dim=1), dim=-1)  # [G, 2B, d]
        # The mask must share the product's dtype, so low-precision logits stay in low precision.
        logits = torch.baddbmm(mask[None], unit, unit.mT, alpha=1 / TEMPERATURE)  # [G, 2B, 2B]
        return F.cross_entropy(logits.flatten(0, 1), target)

    return loss


def chunked_retrieve(case: Case, device: str) -> Function:
    """Retrieval by blocks of queries."""

    def block(state: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(state @ keys.T * keys.shape[-1] ** -0.5, dim=-1) @ keys

    def retrieve(query: Tensor, prototypes: Tensor) -> Tensor:
        d = query.shape[-1]
        state, keys = F.layer_norm(query, (d,)), F.layer_norm(prototypes, (d,))
        blocks = [checkpoint(block, part, keys, use_reentrant=False) for part in state.split(CHUNK)]
        return torch.cat(blocks)

    return retrieve


def chunked_nt_xent(case: Case, device: str) -> Function:
    """NT-Xent by blocks of rows, group by group."""
    batch = case.dims["B"]

    def block(unit: Tensor, first: int, last: int) -> Tensor:
        row = torch.arange(first, last, device=unit.device)
        similarity = unit[first:last] @ unit.T / TEMPERATURE  # [rows, 2B]
        logits = similarity.scatter(1, row[:, None], -torch.inf)
        return F.cross_entropy(logits.float(), (row + batch) % (2 * batch), reduction="sum")

    def loss(z: Tensor, z_pair: Tensor) -> Tensor:
        unit = F.normalize(torch.cat([z, z_pair], dim=1), dim=-1)  # [G, 2B, d]
        total = unit.new_zeros((), dtype=torch.float32)
        for group in unit:
            for first in range(0, 2 * batch, CHUNK):
                last = min(first + CHUNK, 2 * batch)
                total = total + checkpoint(block, group, first, last, use_reentrant=False)
        return total / (unit.shape[0] * unit.shape[1])

    return loss


COMPILED = tuple(Implementation("torch.compile", operator, compiled, stored=3, compiles=True) for operator in OPERATORS)
IMPLEMENTATIONS = (
    Implementation("Python chunks", "retrieve", chunked_retrieve),
    Implementation("Python chunks", "nt_xent", chunked_nt_xent),
    Implementation("eager baddbmm", "nt_xent", batched_nt_xent, stored=3),
)
