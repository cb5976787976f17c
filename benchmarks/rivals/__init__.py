"""Who computes an operator, one idea a file. All take the same inputs and include the normalisation of rows.

An optional dependency that is missing, or a device without a kernel, is an `Unavailable` with the reason.
"""

from __future__ import annotations

from benchmarks.case import Implementation
from benchmarks.rivals import (
    attention,
    baddbmm,
    chunked,
    compiled,
    flex,
    hopfield_layers,
    lightly,
    linear_cross_entropy,
    metric_learning,
    ours,
)

_ALL: tuple[Implementation, ...] = (
    *ours.IMPLEMENTATIONS,
    *compiled.IMPLEMENTATIONS,
    *attention.IMPLEMENTATIONS,
    *flex.IMPLEMENTATIONS,
    *hopfield_layers.IMPLEMENTATIONS,
    *chunked.IMPLEMENTATIONS,
    *baddbmm.IMPLEMENTATIONS,
    *metric_learning.IMPLEMENTATIONS,
    *lightly.IMPLEMENTATIONS,
    *linear_cross_entropy.IMPLEMENTATIONS,
)


def implementations(operator: str) -> list[Implementation]:
    """Every implementation of an operator, eager first."""
    return [implementation for implementation in _ALL if implementation.operator == operator]
