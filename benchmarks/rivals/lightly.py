"""lightly's NTXentLoss where it is installed, else the same computation written from its definition and labelled so.

Four blocks of cosine similarities between the views, the two diagonals of a view with itself taken out, the blocks
joined to [2B, 2B − 1] logits, and a cross-entropy whose class is the other view.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Function, Implementation
from benchmarks.operators.contrast import TEMPERATURE

INSTALLED = importlib.util.find_spec("lightly") is not None


def build(case: Case, device: str) -> Function:
    """The loss takes one batch, so groups are a loop."""
    if INSTALLED:
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(temperature=TEMPERATURE)
    else:
        criterion = by_definition

    def loss(z: Tensor, z_pair: Tensor) -> Tensor:
        return torch.stack([criterion(view, other) for view, other in zip(z, z_pair, strict=True)]).mean()

    return loss


def by_definition(view: Tensor, other: Tensor) -> Tensor:
    """NT-Xent of two views [B, d]."""
    batch = len(view)
    view, other = F.normalize(view, dim=1), F.normalize(other, dim=1)
    unlike = ~torch.eye(batch, dtype=torch.bool, device=view.device)
    across = view @ other.T / TEMPERATURE  # [B, B]
    within_view = (view @ view.T / TEMPERATURE)[unlike].view(batch, -1)  # [B, B − 1]
    within_other = (other @ other.T / TEMPERATURE)[unlike].view(batch, -1)
    logits = torch.cat([torch.cat([across, within_view], dim=1), torch.cat([across.T, within_other], dim=1)])
    return F.cross_entropy(logits, torch.arange(batch, device=view.device).repeat(2))


NAME = "lightly" if INSTALLED else "lightly (formula)"
IMPLEMENTATIONS = (Implementation(NAME, "nt_xent", build, stored=6),)
