"""pytorch-metric-learning's NTXentLoss, from PyPI (`pip install anomem[peers]`).

It compares every positive pair with the list of all negative pairs, so what it stores grows with B³.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Case, Function, Implementation, Unavailable
from benchmarks.operators.contrast import TEMPERATURE


def build(case: Case, device: str) -> Function:
    """Its loss takes one batch, so groups are a loop.

    Raises:
        Unavailable: the package is missing.
    """
    try:
        from pytorch_metric_learning.losses import NTXentLoss
    except ImportError:
        raise Unavailable("pytorch-metric-learning is not installed: pip install 'anomem[peers]'") from None
    criterion = NTXentLoss(temperature=TEMPERATURE)
    labels = torch.arange(case.dims["B"], device=device).repeat(2)

    def loss(z: Tensor, z_pair: Tensor) -> Tensor:
        losses = [criterion(torch.cat([view, other]), labels) for view, other in zip(z, z_pair, strict=True)]
        return torch.stack(losses).mean()

    return loss


def negatives_of_each_pair(dims: dict[str, int]) -> int:
    """[2B, 2B (2B − 2)] for each group."""
    rows = 2 * dims["B"]
    return dims["G"] * rows * rows * (rows - 2)


IMPLEMENTATIONS = (
    Implementation("pytorch-metric-learning", "nt_xent", build, stored=3, elements=negatives_of_each_pair),
)
