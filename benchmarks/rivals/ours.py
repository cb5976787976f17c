"""The library's own implementations of every operator; "reference" is eager PyTorch."""

from __future__ import annotations

import importlib

from benchmarks.case import Case, Function, Implementation, Unavailable
from benchmarks.operators import OPERATORS


def build(impl: str, case: Case, device: str) -> Function:
    """The library's function with `impl`.

    Raises:
        Unavailable: what `anomem.backends` answers.
    """
    operator = OPERATORS[case.operator]
    # Not imported by name: at a base revision the package comes from another folder.
    backends = importlib.import_module("anomem.backends")
    for part in operator.parts or (case.operator,):
        reason = backends.obstacle(part, impl, device, case.torch_dtype, case.dims[operator.width])
        if reason is not None:
            raise Unavailable(reason)
    return operator.ours(impl)


def ours(name: str, impl: str, operator: str, stored: float) -> Implementation:
    """One of the library's implementations of one operator."""
    return Implementation(name, operator, lambda case, device: build(impl, case, device), stored=stored, ours=True)


IMPLEMENTATIONS = tuple(
    implementation
    for operator in OPERATORS
    for implementation in (
        # Eager PyTorch holds logits, their exponentials or weights, and in the backward pass two gradients of them.
        ours("eager", "reference", operator, 4),
        ours("native", "native", operator, 0),
        ours("triton", "triton", operator, 0),
    )
)
