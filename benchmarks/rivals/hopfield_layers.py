"""The static Hopfield lookup as hopfield-layers (Ramsauer et al. 2021) defines it, written from the definition.

The stored patterns are parameters that are repeated for every image of the batch, normalised after that, and met with
the image's queries in a batched product: softmax(β LN(R) LN(Y)ᵀ) LN(Y), one head, no projection, one update.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Function, Implementation


def build(case: Case, device: str) -> Function:
    """Lookup of N/B queries in each of B images."""
    batch = case.dims["B"]

    def retrieve(query: Tensor, prototypes: Tensor) -> Tensor:
        d = query.shape[-1]
        state = F.layer_norm(query.view(batch, -1, d), (d,))  # [B, N/B, d]
        stored = F.layer_norm(prototypes.repeat(batch, 1, 1), (d,))  # [B, M, d]
        weights = torch.softmax(torch.bmm(state * d**-0.5, stored.mT), dim=-1)  # [B, N/B, M]
        return torch.bmm(weights, stored).view(-1, d)

    return retrieve


IMPLEMENTATIONS = (Implementation("hopfield-layers (formula)", "retrieve", build, stored=4),)
