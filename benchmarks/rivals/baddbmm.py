"""Batched eager NT-Xent: one `baddbmm` adds the mask of the diagonal to all groups' similarities at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Function, Implementation
from benchmarks.operators.contrast import TEMPERATURE


def build(case: Case, device: str) -> Function:
    """All groups in one product; mask and targets are made once."""
    groups, batch = case.dims["G"], case.dims["B"]
    mask = torch.zeros(2 * batch, 2 * batch, dtype=case.torch_dtype, device=device).fill_diagonal_(-torch.inf)
    target = torch.arange(2 * batch, device=device).roll(batch).repeat(groups)

    def loss(z: Tensor, z_pair: Tensor) -> Tensor:
        unit = F.normalize(torch.cat([z, z_pair], dim=1), dim=-1)  # [G, 2B, d]
        # The mask must share the product's dtype, so low-precision logits stay in low precision here.
        logits = torch.baddbmm(mask[None], unit, unit.mT, alpha=1 / TEMPERATURE)  # [G, 2B, 2B]
        return F.cross_entropy(logits.flatten(0, 1), target)

    return loss


IMPLEMENTATIONS = (Implementation("eager baddbmm", "nt_xent", build, stored=3),)
