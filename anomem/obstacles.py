"""What can run here, and why not if not: None where an implementation can run a call, else a sentence."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from operator import index

import torch

from anomem.ops.library import in_forward_mode
from anomem.rules import IMPLEMENTATIONS, OPERATORS, Problem

_TRITON_OPERATORS = ("retrieve", "nt_xent", "info_nce", "nearest", "read")
_NATIVE_CUDA_OPERATORS = ("retrieve", "gather", "variance", "deviation_map")


def obstacle_of(problem: Problem, implementation: str) -> str | None:
    """Why this implementation cannot run this call, or None if it can."""
    # Under torch.compile with dynamic shapes a length is a symbol: index() settles the row length, on which it depends
    # what can run, and leaves the other lengths dynamic.
    features, steps = index(problem.features), index(problem.steps)
    if implementation != "reference" and in_forward_mode():
        return "forward-mode differentiation (jvp, jacfwd, hessian) runs through the reference only"
    return _constant_obstacle(problem.operator, implementation, problem.device, problem.dtype, features, steps)


def obstacle(
    operator: str, implementation: str, device: str, dtype: torch.dtype, features: int, steps: int = 1
) -> str | None:
    """Why this implementation cannot run this operator here, or None if it can.

    Args:
        operator: one of `OPERATORS`.
        implementation: "reference", "triton" or "native".
        device: device type of the tensors.
        dtype: their dtype.
        features: length of a row.
        steps: reads of the memory.
    """
    if implementation == "reference":
        return None
    if implementation == "triton":
        return _triton_obstacle(operator, device, dtype, features)
    return _native_obstacle(operator, device, dtype, steps)


def table(device: str, dtype: torch.dtype = torch.float32, features: int = 128) -> Iterator[tuple[str, str, str]]:
    """Every operator × implementation with "runs", under which condition, or the reason why not, for printing.

    Yields:
        (operator, implementation, an answer that begins with "runs" or the obstacle).
    """
    for operator in OPERATORS:
        for implementation in IMPLEMENTATIONS[1:]:
            why_not = obstacle(operator, implementation, device, dtype, features)
            later = obstacle(operator, implementation, device, dtype, features, steps=2)
            answer = why_not or ("runs" if later is None else f"runs with steps=1: {later}")
            yield operator, implementation, answer


def source_of_tiles() -> str:
    """Where the tile sizes of the Triton kernels come from on the current GPU, or why the kernels do not run there."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    reason = _triton_obstacle("retrieve", "cuda", torch.float32, 64)
    if reason is not None:
        return reason
    source: str = importlib.import_module("anomem.kernels.tile_search").source(
        torch.device("cuda", torch.cuda.current_device())
    )
    return source


def has_kernel(problem: Problem, impl: str) -> bool:
    """Whether the operator has such a kernel for the call's device, whether or not it can run here."""
    if impl == "triton":
        return problem.operator in _TRITON_OPERATORS
    return impl != "native" or problem.device != "cuda" or problem.operator in _NATIVE_CUDA_OPERATORS


def _constant_obstacle(
    operator: str, implementation: str, device: str, dtype: torch.dtype, features: int, steps: int
) -> str | None:
    # Loading a library cannot be traced; its outcome does not change within a process.
    return obstacle(operator, implementation, device, dtype, features, steps)


def _native_obstacle(operator: str, device: str, dtype: torch.dtype, steps: int) -> str | None:
    from anomem.ops import native

    if device == "cuda" and operator not in _NATIVE_CUDA_OPERATORS:
        return f"the native library has no CUDA kernel for {operator}"
    if operator == "deviation_map" and steps > 1:
        return "the native deviation map reads the memory once; more steps run the reference"
    if operator == "augment" and dtype not in (torch.uint8, torch.float32):
        return f"the native augmentation takes uint8 and float32, not {str(dtype).removeprefix('torch.')}"
    if device == "cpu" and dtype == torch.float16:
        return "the native CPU kernels take float32, bfloat16 and float64, not float16"
    if device == "cuda" and dtype == torch.float64:
        return "the native CUDA kernels take float32, bfloat16 and float16, not float64"
    if device == "cuda" and _capability() < (8, 0):
        return "the native CUDA kernels need compute capability 8.0 or later"
    return native.obstacle(device)


@functools.cache
def _capability() -> tuple[int, int]:
    """Of the current GPU; where there is none nothing depends on it."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


def _triton_obstacle(operator: str, device: str, dtype: torch.dtype, features: int) -> str | None:
    if operator not in _TRITON_OPERATORS:
        return f"there is no Triton kernel for {operator}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with the CUDA builds of torch)"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "Triton runs CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before Python starts"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA devices, not on {device}"
    if dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16, not float64"
    if importlib.util.find_spec("anomem.kernels") is None:
        return "anomem.kernels is not installed"
    reason: str | None = importlib.import_module("anomem.kernels").support(operator, dtype, features)
    return reason


# What the decorator torch.compiler.assume_constant_result sets; tests/test_backends.py compares. The decorator itself
# imports the compiler and Triton, most of a second that a program which compiles nothing would wait for.
_constant_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
