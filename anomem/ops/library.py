"""The `anomem::` operator library: schemas and fakes, which exist whether or not a kernel can run here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

LIBRARY = torch.library.Library("anomem", "DEF")

Fake = Callable[..., Any]
Function = TypeVar("Function", bound=type[torch.autograd.Function])


def define(name: str, schema: str, fake: Fake) -> None:
    """Declare `anomem::name` with its schema and its shape function.

    The op carries `pt2_compliant_tag`-free defaults: it mutates nothing and aliases nothing.
    """
    LIBRARY.define(name + schema)
    torch.library.register_fake(f"anomem::{name}", fake, lib=LIBRARY)


def implement_with_triton(name: str) -> None:
    """Let `anomem::name` run its function in `anomem.kernels.OPERATORS`, imported by the first call.

    On CPU tensors too: that is Triton's interpreter, which `anomem.backends` admits only when it is switched on.
    """
    operator = f"anomem::{name}"

    def run(*args: Any) -> Any:
        return importlib.import_module("anomem.kernels").implementation(operator)(*args)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)


def with_known_signature(function: Function) -> Function:
    """Class decorator: keeps the signature of `forward`.

    torch binds the arguments of each `apply` to it and would read it from the code anew: a tenth of a small call.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype in which kernels accumulate and give losses: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous uninitialised tensor on the device of `like`, for fakes."""
    return like.new_empty(shape, dtype=dtype or like.dtype)
