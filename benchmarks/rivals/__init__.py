"""Who computes an operator. All take the same inputs and include the normalisation of rows.

A missing package, or a device without a kernel, raises `Unavailable` with the reason.
"""

from __future__ import annotations

from benchmarks.harness.case import Implementation
from benchmarks.rivals import attention, augment, contrast, ours, plain

_ALL: tuple[Implementation, ...] = (
    *ours.IMPLEMENTATIONS,
    *plain.COMPILED,
    *attention.IMPLEMENTATIONS,
    *plain.IMPLEMENTATIONS,
    *contrast.IMPLEMENTATIONS,
    *augment.IMPLEMENTATIONS,
)


def implementations(operator: str) -> list[Implementation]:
    """Every implementation of an operator, eager first."""
    return [implementation for implementation in _ALL if implementation.operator == operator]
