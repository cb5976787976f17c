"""Batches of all processes, with a gradient: what a contrast over more than one device compares with."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def spread() -> bool:
    """Whether there is more than one process to gather from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of every process of the default group, in the order of their ranks.

    The backward sums over the processes what each one's loss wants of these rows.

    Args:
        rows: [(G,) R, d], the same R in every process.

    Returns:
        [(G,) W·R, d] of all W processes, and where this process's own rows begin.
    """
    everyone: Tensor = _Gather.apply(rows)  # [W, (G,) R, d]
    return everyone.movedim(0, -3).flatten(-3, -2), dist.get_rank() * rows.shape[-2]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        everyone = rows.new_empty(dist.get_world_size(), *rows.shape)
        dist.all_gather(list(everyone), rows.contiguous())
        return everyone

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank()]
