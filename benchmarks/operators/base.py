"""What an operator's file declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import Case, Function

Dims = dict[str, int]


@dataclass(frozen=True)
class Work:
    """The least that any exact algorithm we know of does; an implementation that recomputes does more."""

    flops: float
    """Multiplications and additions of matrix products."""
    bytes: float
    """Inputs, results and gradients, each moved once between memory and chip."""
    exponentials: float = 0.0


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
    """Elements of the intermediate that plain PyTorch writes out."""
    smaller: Callable[[Dims], Dims]
    """A size at which the float64 check is cheap, with the axes that decide about a kernel's code path kept."""
    width: str = "d"
    """Which size is the length of a row, for `anomem.backends.obstacle`."""
    parts: tuple[str, ...] = ()
    """The operators of `anomem.backends` that it is made of, where it is not one itself."""

    def least_work(self, case: Case) -> Work:
        """The work of a case."""
        return self.work(case.dims, case.torch_dtype.itemsize, case.training)


def capped(dims: Dims, **limits: int) -> Dims:
    """Sizes, each at most its limit."""
    return {name: min(value, limits.get(name, value)) for name, value in dims.items()}
