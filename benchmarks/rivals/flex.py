"""FlexAttention without a mask or a score function, folded as in `attention.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Function, Implementation, Unavailable


def build(case: Case, device: str) -> Function:
    """Compiled FlexAttention; LayerNorm of queries and prototypes included.

    Raises:
        Unavailable: a backward pass on a CPU, or rows that its kernels do not take.
    """
    if device == "cpu" and case.training:
        raise Unavailable("FlexAttention has no backward pass on CPUs")
    from torch.nn.attention.flex_attention import flex_attention

    def retrieve(query: Tensor, prototypes: Tensor) -> Tensor:
        d = query.shape[-1]
        # Normalised after the axes are added: inductor's CPU template takes no view of a matrix it has yet to compute.
        state = F.layer_norm(query[None, None], (d,))  # [1, 1, N, d]
        keys = F.layer_norm(prototypes[None, None], (d,))  # [1, 1, M, d]
        return flex_attention(state, keys, keys)[0, 0]

    function: Function = torch.compile(retrieve, dynamic=False)
    return function


IMPLEMENTATIONS = (Implementation("FlexAttention", "retrieve", build, compiles=True),)
