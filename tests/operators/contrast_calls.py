"""NT-Xent as a function of tensors alone, its specification, its error budget and its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import reference as R
from anomem.functional import nt_xent
from anomem.rules import Impl
from anomem.testing import compare, draw
from tests.operators.contract import F32, NATIVE, REFERENCE, TRITON, Function

ALL = (REFERENCE, NATIVE, TRITON)
KERNELS = (NATIVE, TRITON)
OPERATORS = torch.ops.anomem


def rows_of(impl: Impl, tau: float = 0.2) -> Function:
    return lambda z, z_pair: nt_xent(z, z_pair, temperature=tau, reduction="none", impl=impl)


def plain_rows(tau: float = 0.2) -> Function:
    return lambda z, z_pair: R.nt_xent_rows(z, z_pair, tau)


def check(impl: Impl, tau: float, inputs: list[Tensor]) -> None:
    """NT-Xent's losses and gradients within the budget."""
    compare(rows_of(impl, tau), plain_rows(tau), inputs)


def views(groups: int, batch: int, features: int, dtype: torch.dtype = F32, seed: int = 0) -> list[Tensor]:
    return [draw(groups, batch, features, dtype=dtype, seed=seed + i) for i in range(2)]
