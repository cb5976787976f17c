"""Number formats of PTX in numpy: registers hold unsigned integers, which are read as some type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8,
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Unsigned integers by their bytes."""
_SMALLEST_NORMAL = np.float32(1.17549435e-38)


def from_bf16(bits: Array) -> Array:
    """bfloat16 → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Array) -> Array:
    """float32 → bfloat16, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_f16(bits: Array) -> Array:
    """float16 → float32."""
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def to_f16(x: Array) -> Array:
    """float32 → float16, to nearest even."""
    return x.astype(np.float16).view(np.uint16)


def from_tf32(bits: Array) -> Array:
    """What the matrix unit reads of float32: it drops the last 13 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


READERS: dict[str, Callable[[Array], Array]] = {"bf16": from_bf16, "f16": from_f16, "tf32": from_tf32}
"""Formats of the operands of a matrix instruction."""


def flush(x: Array) -> Array:
    """Subnormal numbers become zero (.ftz)."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def bytes_of(x: Array) -> Array:
    """[n] numbers → [n, size] bytes."""
    return np.ascontiguousarray(x)[:, None].view(np.uint8)


def from_bytes(x: Array, size: int) -> Array:
    """[..., size] bytes → [...] unsigned integers."""
    return np.ascontiguousarray(x).view(RAW[size])[..., 0]
