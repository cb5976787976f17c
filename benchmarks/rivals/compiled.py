"""`torch.compile` of the reference, with static sizes."""

from __future__ import annotations

import torch

from benchmarks.case import Case, Function, Implementation
from benchmarks.operators import OPERATORS


def build(case: Case, device: str) -> Function:
    """The reference, compiled when it is first called."""
    function: Function = torch.compile(OPERATORS[case.operator].ours("reference"), dynamic=False, fullgraph=True)
    return function


IMPLEMENTATIONS = tuple(
    Implementation("torch.compile", operator, build, stored=3, compiles=True) for operator in OPERATORS
)
