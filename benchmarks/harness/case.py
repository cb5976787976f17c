"""The words of the harness: an `Operator` at one size is a `Case`, and `Implementation`s compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., Tensor]
"""From an operator's inputs to its result."""
Dims = dict[str, int]
"""Sizes by name, e.g. {"N": 4096, "M": 512, "d": 64}."""


@dataclass(frozen=True)
class Work:
    """Least work of the best exact algorithm we know; an implementation that recomputes does more."""

    flops: float
    """Multiplications and additions of matrix products."""
    bytes: float
    """Inputs, results and gradients, each moved once between memory and chip."""
    exponentials: float = 0.0


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    operator: str
    """Name, a key of `benchmarks.operators.OPERATORS`."""
    shape: tuple[tuple[str, int], ...]
    """Sizes by name, e.g. (("N", 4096), ("M", 512), ("d", 64))."""
    dtype: str = "float32"
    training: bool = True
    """Forward and backward, or the forward pass alone without a graph."""
    group: str = ""
    """Group of cases in a suite: the scale of a network, a sweep."""

    @property
    def dims(self) -> Dims:
        """The shape as a dictionary."""
        return dict(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def title(self) -> str:
        """Name of the case in one line; `--filter` searches it."""
        sizes = " ".join(f"{name}={value}" for name, value in self.shape)
        passes = "forward+backward" if self.training else "forward"
        return " ".join(filter(None, (self.operator, sizes, self.dtype, passes, self.group)))


def case(operator: str, *, dtype: str = "float32", training: bool = True, group: str = "", **dims: int) -> Case:
    """A `Case` with its sizes as keywords."""
    return Case(operator, tuple(dims.items()), dtype, training, group)


@dataclass(frozen=True)
class Operator:
    """One operator of the library."""

    name: str
    formula: str
    inputs: Callable[[Dims, torch.dtype, int], tuple[Tensor, ...]]
    """(sizes, dtype, seed) -> tensors on the CPU; floating ones get gradients in training."""
    ours: Callable[[str], Function]
    """impl= -> the library's function; "reference" is the specification."""
    work: Callable[[Dims, int, bool], Work]
    """(sizes, bytes of an element, training) -> work."""
    stored: Callable[[Dims], int]
    """Elements of the intermediate that plain PyTorch stores."""
    smaller: Callable[[Dims], Dims]
    """Sizes at which the float64 check is cheap; axes that select a kernel's code path are unchanged."""
    width: str = "d"
    """Name of the size that is a row's length, for `anomem.obstacles.obstacle`."""
    parts: tuple[str, ...] = ()
    """Operators of `anomem.backends` that it calls, if it is not one itself."""

    def least_work(self, case: Case) -> Work:
        """The work of a case."""
        return self.work(case.dims, case.torch_dtype.itemsize, case.training)


def capped(dims: Dims, **limits: int) -> Dims:
    """Sizes, each at most its limit."""
    return {name: min(value, limits.get(name, value)) for name, value in dims.items()}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    name: str
    operator: str
    build: Callable[[Case, str], Function]
    """(case, device type) -> function; raises `benchmarks.harness.rows.Unavailable`."""
    stored: float = 0.0
    """Copies of the intermediate alive at the peak of training. An estimate: a case that would not fit is not
    started."""
    elements: Callable[[Dims], int] | None = None
    """Elements of its intermediate, if they are not `Operator.stored`."""
    compiles: bool = False
    """Compiles at its first call; rows give the time to compile apart."""
    ours: bool = False
    """Part of this library; also measured at the base revision."""
