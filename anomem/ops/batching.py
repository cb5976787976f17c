"""`torch.func.vmap` over operators that already have a batch axis: fold where it has a meaning, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the mapped axis to the front, or add one by expansion."""
    return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)


def one_by_one(
    call: Callable[..., tuple[Tensor, ...]], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Call once per element of the mapped axis and stack: for what no kernel batches (a memory per element)."""
    results = []
    for i in range(size):
        picked = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
        results.append(call(*picked))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
