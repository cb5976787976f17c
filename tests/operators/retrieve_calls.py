"""Retrieval as a function of tensors alone, its specification, its error budget and its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomem import reference as R
from anomem.functional import hopfield_retrieve
from anomem.rules import Impl
from anomem.testing import compare, draw
from tests.operators.contract import F32, NATIVE, REFERENCE, TRITON, TRITON_TF32, Function

ALL = (REFERENCE, NATIVE, TRITON, TRITON_TF32)
KERNELS = (NATIVE, TRITON, TRITON_TF32)
NORMALIZE = ("none", "layer", "l2")


def retrieval(impl: Impl, **options: Any) -> Function:
    """Retrieval with its lse as a function of tensors alone; with `shrink`, with the entropy too."""

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None = None, beta: Tensor | None = None) -> Any:
        given = options if beta is None else {**options, "beta": beta}
        return hopfield_retrieve(
            query, prototypes, values=values, return_lse=True, return_entropy="shrink" in options, impl=impl, **given
        )

    return run


def plain(impl: Impl, **options: Any) -> Function:
    """What an implementation's error is measured in.

    The Triton kernels multiply half-precision rows as the specification does in that dtype. The others compute as the
    documented function does on plain PyTorch: in float32, rounded once.
    """
    if impl != "triton":
        return retrieval("reference", **options)

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None = None, beta: Tensor | None = None) -> Any:
        given = options if beta is None else {**options, "beta": beta}
        found = R.hopfield_retrieve(query, prototypes, values=values, **given)
        return found.out, found.lse

    return run


def check(impl: Impl, inputs: list[Tensor | None], **options: Any) -> None:
    """Results and all gradients, those through lse included, within the budget."""
    compare(retrieval(impl, **options), plain(impl, **options), inputs)


def memory(n: int, m: int, d: int, dv: int = 0, dtype: torch.dtype = F32) -> list[Tensor | None]:
    """query [n, d], prototypes [m, d], values [m, dv] or, where dv is 0, None: the normalised prototypes are read."""
    values = draw(m, dv, dtype=dtype, seed=3) if dv else None
    return [draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2), values]


def pair(n: int, m: int, d: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """query [n, d], prototypes [m, d]."""
    return draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2)
