"""Chunking in Python: blocks of rows under `torch.utils.checkpoint`, so that only one block's scores are alive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.case import Case, Function, Implementation
from benchmarks.operators.contrast import TEMPERATURE

CHUNK = 2048
"""Rows of a block."""


def build_retrieve(case: Case, device: str) -> Function:
    """Retrieval by blocks of queries."""

    def block(state: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(state @ keys.T * keys.shape[-1] ** -0.5, dim=-1) @ keys

    def retrieve(query: Tensor, prototypes: Tensor) -> Tensor:
        d = query.shape[-1]
        state, keys = F.layer_norm(query, (d,)), F.layer_norm(prototypes, (d,))
        blocks = [checkpoint(block, part, keys, use_reentrant=False) for part in state.split(CHUNK)]
        return torch.cat(blocks)

    return retrieve


def build_nt_xent(case: Case, device: str) -> Function:
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


IMPLEMENTATIONS = (
    Implementation("Python chunks", "retrieve", build_retrieve),
    Implementation("Python chunks", "nt_xent", build_nt_xent),
)
