"""What is measured (`Case`) and who computes it (`Implementation`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., Tensor]
"""From an operator's inputs to its result."""


class Unavailable(Exception):
    """Why an implementation cannot compute a case, in words for the table."""


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    operator: str
    shape: tuple[tuple[str, int], ...]
    """Names as in the operator's file, e.g. (("N", 4096), ("M", 512), ("d", 64))."""
    dtype: str = "float32"
    training: bool = True
    """Forward and backward, or the forward pass alone without a graph."""
    group: str = ""
    """What the case belongs to: a network's scales, or a sweep."""

    @property
    def dims(self) -> dict[str, int]:
        """The shape as a dictionary."""
        return dict(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def title(self) -> str:
        """One line that names the case; `--filter` searches it."""
        sizes = " ".join(f"{name}={value}" for name, value in self.shape)
        passes = "forward+backward" if self.training else "forward"
        return " ".join(filter(None, (self.operator, sizes, self.dtype, passes, self.group)))


def case(operator: str, *, dtype: str = "float32", training: bool = True, group: str = "", **dims: int) -> Case:
    """A `Case` with its sizes as keywords."""
    return Case(operator, tuple(dims.items()), dtype, training, group)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    name: str
    operator: str
    build: Callable[[Case, str], Function]
    """(case, device type) -> function; raises `Unavailable`."""
    stored: float = 0.0
    """How many times the intermediate is alive at the peak of training; an estimate that keeps a case from being
    started where it would not fit."""
    elements: Callable[[dict[str, int]], int] | None = None
    """Elements of the intermediate, where it is not the operator's own (`Operator.stored`)."""
    compiles: bool = False
    """Compiles when it is first called; how long that takes is a figure of its own."""
    ours: bool = False
    """Part of this library; also measured at the base revision."""
