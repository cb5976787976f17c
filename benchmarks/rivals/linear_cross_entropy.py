"""`F.linear_cross_entropy`: InfoNCE whose columns are the weight of a classifier.

It cannot hide a column from a row, so it computes InfoNCE between two sets and not NT-Xent.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Function, Implementation, Unavailable
from benchmarks.operators.contrast import INFO_NCE_TEMPERATURE


def build(chunked: bool, case: Case, device: str) -> Function:
    """Normalisation of both sides, then the fused product and cross-entropy.

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
    Implementation("linear_cross_entropy", "info_nce", partial(build, False), stored=3),
    Implementation("linear_cross_entropy chunked", "info_nce", partial(build, True), stored=1),
)
