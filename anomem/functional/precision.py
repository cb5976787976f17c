"""How inputs meet a kernel: autocast, accumulation dtype, strides."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def accumulator(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_inputs(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast to the autocast dtype where autocast is on; float64 is left alone, as torch's own matrix products do."""
    device = next(t.device.type for t in tensors if t is not None)
    if not _autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """The reference chooses its own precision: no cast of its inner products."""
    if _autocast_is_on(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _autocast_is_on(device: str) -> bool:
    # On "meta" tensors shapes are tried out; it has no autocast, and asking it is an error.
    return device != "meta" and torch.is_autocast_enabled(device)


def unit_inner_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def scalar(value: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """Split a number-or-tensor into what kernels take: (tensor in the accumulation dtype or None, number).

    The number beside a tensor is 1: kernels multiply where a scale makes sense and ignore it elsewhere.
    """
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=accumulator(like)), 1.0
    return None, float(value)
