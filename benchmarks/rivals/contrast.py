"""Contrastive losses of other libraries: pytorch-metric-learning, lightly, `F.linear_cross_entropy`."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import Case, Dims, Function, Implementation
from benchmarks.harness.rows import Unavailable
from benchmarks.operators_contrast import INFO_NCE_TEMPERATURE, TEMPERATURE

HAVE_LIGHTLY = importlib.util.find_spec("lightly") is not None


def metric_learning(case: Case, device: str) -> Function:
    """pytorch-metric-learning's NTXentLoss. It takes one batch, so groups are a loop.

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


def negatives_of_each_pair(dims: Dims) -> int:
    """[2B, 2B (2B − 2)] for each group: it compares every positive pair with the list of all negative pairs."""
    rows = 2 * dims["B"]
    return dims["G"] * rows * rows * (rows - 2)


def lightly(case: Case, device: str) -> Function:
    """lightly's NTXentLoss if it is installed, else its definition. It takes one batch, so groups are a loop."""
    if HAVE_LIGHTLY:
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(temperature=TEMPERATURE)
    else:
        criterion = lightly_formula

    def loss(z: Tensor, z_pair: Tensor) -> Tensor:
        return torch.stack([criterion(view, other) for view, other in zip(z, z_pair, strict=True)]).mean()

    return loss


def lightly_formula(view: Tensor, other: Tensor) -> Tensor:
    """NT-Xent of two views [B, d] as lightly computes it.

    Four blocks of cosine similarities between the views lose the two diagonals of a view with itself and are joined to
    logits [2B, 2B − 1]; the class in the cross-entropy is the other view.
    """
    batch = len(view)
    view, other = F.normalize(view, dim=1), F.normalize(other, dim=1)
    unlike = ~torch.eye(batch, dtype=torch.bool, device=view.device)
    across = view @ other.T / TEMPERATURE  # [B, B]
    within_view = (view @ view.T / TEMPERATURE)[unlike].view(batch, -1)  # [B, B − 1]
    within_other = (other @ other.T / TEMPERATURE)[unlike].view(batch, -1)
    logits = torch.cat([torch.cat([across, within_view], dim=1), torch.cat([across.T, within_other], dim=1)])
    return F.cross_entropy(logits, torch.arange(batch, device=view.device).repeat(2))


def linear_cross_entropy(chunked: bool, case: Case, device: str) -> Function:
    """Normalisation of both sides, then the fused product and cross-entropy; columns are a classifier's weight.

    It cannot exclude a column for one row, so it computes InfoNCE and not NT-Xent.

    Raises:
        Unavailable: this torch has no such function.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no F.linear_cross_entropy")
    keywords = {}
    if chunked:
        try:
            from torch.nn import LinearCrossEntropyOptions
        except ImportError:
            raise Unavailable("this torch's F.linear_cross_entropy has no chunked form") from None
        keywords["options"] = LinearCrossEntropyOptions()

    def loss(rows: Tensor, columns: Tensor, positive: Tensor) -> Tensor:
        scaled = F.normalize(rows, dim=-1) / INFO_NCE_TEMPERATURE
        return F.linear_cross_entropy(scaled, F.normalize(columns, dim=-1), positive, **keywords)

    return loss


IMPLEMENTATIONS = (
    Implementation("pytorch-metric-learning", "nt_xent", metric_learning, stored=3, elements=negatives_of_each_pair),
    Implementation("lightly" if HAVE_LIGHTLY else "lightly (formula)", "nt_xent", lightly, stored=6),
    Implementation("linear_cross_entropy", "info_nce", partial(linear_cross_entropy, False), stored=3),
    Implementation("linear_cross_entropy chunked", "info_nce", partial(linear_cross_entropy, True), stored=1),
)
