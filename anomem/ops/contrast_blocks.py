"""NT-Xent of a batch whose rows are made block by block: log-sums of two blocks, and a gradient's part that one gives.

`anomem.reference.contrast` has the formulas; there is no Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.ops.library import define, empty, operator


def _forward_fake(block: Tensor, other: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    sums = [empty(block, 0 if x is None else x.shape[0], dtype=torch.float64) for x in (block, other)]
    return sums[0], sums[1]


def _backward_fake(block: Tensor, other: Tensor | None, lse: Tensor, other_lse: Tensor | None, tau: float) -> Tensor:
    return empty(block, *block.shape)


define(
    "native_contrast_block_fwd",
    "(Tensor block, Tensor? other, float tau) -> (Tensor lse, Tensor other_lse)",
    _forward_fake,
)
define(
    "native_contrast_block_bwd",
    "(Tensor block, Tensor? other, Tensor lse, Tensor? other_lse, float tau) -> Tensor",
    _backward_fake,
)


def log_sums(block: Tensor, other: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    """`reference.block_log_sums` by the native kernel.

    Args:
        block: [R, d], unit inner stride.
        other: [C, d], or None for the block itself.
        tau: the temperature.
    """
    lse, other_lse = operator("contrast_block_fwd", "native")(block, other, tau)
    return lse, other_lse


def gradient(block: Tensor, other: Tensor | None, lse: Tensor, other_lse: Tensor | None, tau: float) -> Tensor:
    """`reference.block_gradient` by the native kernel.

    Args:
        block: [R, d], unit inner stride.
        other: [C, d], or None for the block itself.
        lse: [R] float64.
        other_lse: [C] float64, with `other` only.
        tau: the temperature.
    """
    found: Tensor = operator("contrast_block_bwd", "native")(block, other, lse, other_lse, tau)
    return found
