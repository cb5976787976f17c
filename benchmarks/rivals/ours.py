"""The library's own implementations of every operator; eager is its reference in plain PyTorch."""

from __future__ import annotations

from anomem import obstacles
from benchmarks.harness.case import Case, Function, Implementation
from benchmarks.harness.rows import Unavailable
from benchmarks.operators import OPERATORS


def build(impl: str, case: Case, device: str) -> Function:
    """The library's function with `impl`.

    Raises:
        Unavailable: the obstacle that `anomem.backends` names.
    """
    operator = OPERATORS[case.operator]
    for part in operator.parts or (case.operator,):
        reason = obstacles.obstacle(part, impl, device, case.torch_dtype, case.dims[operator.width])
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
