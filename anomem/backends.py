"""What can run here, why not if not, and the choice behind `impl="auto"`.

Each backend answers an operator with None (it can run) or a sentence (why it cannot). The table `AUTO` then picks among
those that can, by measured size limits; `python -m anomem.env` prints both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from operator import index
from typing import Literal, NamedTuple

import torch

from anomem.errors import ArgumentError
from anomem.ops.composite import in_forward_mode
from anomem.validation import require_choice

Impl = Literal["auto", "reference", "triton", "native"]
IMPLEMENTATIONS = ("auto", "reference", "triton", "native")
OPERATORS = (
    "retrieve",
    "shrink",
    "nt_xent",
    "info_nce",
    "gather",
    "variance",
    "deviation_map",
    "usage",
)
_TRITON_OPERATORS = ("retrieve", "nt_xent", "info_nce")
_NATIVE_CUDA_OPERATORS = ("retrieve", "gather", "variance", "deviation_map")


class Problem(NamedTuple):
    """One call, as far as the choice of an implementation depends on it."""

    operator: str
    device: str
    """Device type: "cpu" or "cuda"."""
    dtype: torch.dtype
    features: int
    """d, the length of a row."""
    rows: int = 0
    """N queries, or rows of one group."""
    columns: int = 0
    """M prototypes, or columns of one group."""
    groups: int = 1
    """G."""


class Rule(NamedTuple):
    """One line of the auto table: on this device this implementation is taken where `applies` says so."""

    operator: str
    device: str
    implementation: str
    where: str
    """The condition in words."""
    reason: str
    applies: Callable[[Problem], bool]


def _float32_or_bfloat16(problem: Problem) -> bool:
    return problem.dtype in (torch.float32, torch.bfloat16)


def _memory_read(problem: Problem) -> bool:
    sizes = problem.rows >= 1024 and problem.columns >= 64 and problem.features >= 64
    return sizes and _float32_or_bfloat16(problem)


def _large_memory_read(problem: Problem) -> bool:
    return _memory_read(problem) and problem.rows >= 8192 and problem.columns >= 512


def _large_contrast(problem: Problem) -> bool:
    return _float32_or_bfloat16(problem) and problem.rows * problem.columns >= 2**20


def _short_rows(problem: Problem) -> bool:
    return _float32_or_bfloat16(problem) and problem.features <= 256


def _beyond_a_gpu(problem: Problem) -> bool:
    return problem.groups * problem.rows * problem.columns >= 2**33


def _where_plain_pytorch_does_not_fit(operator: str, scores: str, size: int) -> Rule:
    """No GPU was measured yet: a kernel is taken where, on all but the largest, it could be slower than nothing.

    Args:
        operator: whose rule.
        scores: what counts them, in words.
        size: bytes for each that plain PyTorch holds at the peak of both passes; counted by tests/stand_in.
    """
    return Rule(
        operator,
        "cuda",
        "triton",
        f"{scores} ≥ 2^33 on a GPU",
        f"plain PyTorch takes {size} bytes a score for both passes, {8 * size} GiB and more, and the kernel nothing "
        "that grows with their number (counted, not timed on a GPU yet)",
        _beyond_a_gpu,
    )


# The reasons quote the committed rows of benchmarks/results: forward and backward; on the CPU 2 threads, AVX-512.
AUTO: tuple[Rule, ...] = (
    Rule(
        "retrieve",
        "cpu",
        "native",
        "float32 and bfloat16, N ≥ 1024, M ≥ 64 and d ≥ 64 on the CPU",
        "1.4 to 5.8 times as fast as eager, at least 1.3 times as any other implementation, N up to 2^20, M to 8192, "
        "d to 2048; in bfloat16 1.7 to 8.2 times, 1.04 to 1.6 times as any other, N up to 32768, M to 512, d to 256",
        _memory_read,
    ),
    Rule(
        "shrink",
        "cpu",
        "native",
        "float32 and bfloat16, N ≥ 8192, M ≥ 512 and d ≥ 64 on the CPU",
        "2.6 times as fast as eager and 1.2 times as torch.compile, at N=8192, M=512, d=64; in bfloat16 3.7 and 1.5",
        _large_memory_read,
    ),
    Rule(
        "nt_xent",
        "cpu",
        "native",
        "float32 and bfloat16 on the CPU",
        "2.4 to 12.9 times as fast as eager in float32, G=1 to 64, B=128 to 8192, d=64 to 2048; 7 times in bfloat16, "
        "G=8, B=256, d=128, and 14 times at G=4, B=1024, d=256",
        _float32_or_bfloat16,
    ),
    Rule(
        "info_nce",
        "cpu",
        "native",
        "float32 and bfloat16, R·C ≥ 2^20 on the CPU",
        "2.1 to 4.9 times as fast as eager, at least 1.6 times as any other implementation, up to R=C=4096, d=128; "
        "3.2 to 4.0 times in bfloat16, 1.1 times as fast as F.linear_cross_entropy; at R=C=128 torch.compile is faster",
        _large_contrast,
    ),
    Rule(
        "gather",
        "cpu",
        "native",
        "float32 and bfloat16 on the CPU",
        "2.1 to 2.7 times as fast as eager in float32, B=128, 4×4 to 16×16 maps; 2.8 times in bfloat16, 16×16",
        _float32_or_bfloat16,
    ),
    Rule(
        "variance",
        "cpu",
        "native",
        "float32 and bfloat16 on the CPU",
        "4.7 to 11 times as fast as eager in float32, G=8, B=128, d=128 to 512; 4.4 times in bfloat16, d=128",
        _float32_or_bfloat16,
    ),
    Rule(
        "deviation_map",
        "cpu",
        "native",
        "float32 and bfloat16, d ≤ 256 on the CPU",
        "1.5 to 3.7 times as fast as eager in float32, B=128, 8×8 and 16×16 maps, 64 prototypes, in about a thousandth "
        "of its memory; 2.8 times in bfloat16, 16×16; at d=512, 4×4 eager is as fast",
        _short_rows,
    ),
    Rule(
        "usage",
        "cpu",
        "native",
        "float32 and bfloat16 on the CPU",
        "7.1 times as fast as eager in float32, 9.6 times in bfloat16, N=16384, M=512, d=64",
        _float32_or_bfloat16,
    ),
    _where_plain_pytorch_does_not_fit("retrieve", "N·M", 16),
    _where_plain_pytorch_does_not_fit("nt_xent", "G·(2B)²", 21),
    _where_plain_pytorch_does_not_fit("info_nce", "G·R·C", 20),
)


def obstacle(operator: str, implementation: str, device: str, dtype: torch.dtype, features: int) -> str | None:
    """Why this implementation cannot run this operator here, or None if it can.

    Args:
        operator: one of `OPERATORS`.
        implementation: "reference", "triton" or "native".
        device: device type of the tensors.
        dtype: their dtype.
        features: length of a row.
    """
    if implementation == "reference":
        return None
    if implementation == "triton":
        return _triton_obstacle(operator, device, dtype, features)
    return _native_obstacle(operator, device, dtype)


def for_part(operator: str, device: str, impl: Impl) -> Impl:
    """What to ask one operator of a larger computation for, when the whole was asked to use `impl`.

    A whole training run with `impl="triton"` means Triton wherever there is a Triton kernel: the operators that have
    none choose by "auto". An operator that has a kernel which cannot run here still raises.
    """
    if impl == "triton" and operator not in _TRITON_OPERATORS:
        return "auto"
    if impl == "native" and device == "cuda" and operator not in _NATIVE_CUDA_OPERATORS:
        return "auto"
    return impl


def _obstacle_of(problem: Problem, implementation: str) -> str | None:
    # Under torch.compile with dynamic shapes a length is a symbol: index() settles the row length, on which it depends
    # what can run, and leaves the other lengths dynamic.
    features = index(problem.features)
    if implementation != "reference" and in_forward_mode():
        return "forward-mode differentiation (jvp, jacfwd, hessian) runs through the reference only"
    return _constant_obstacle(problem.operator, implementation, problem.device, problem.dtype, features)


def choose(problem: Problem, impl: str) -> str:
    """The implementation that will run a call.

    Args:
        problem: the call.
        impl: what the user asked for.

    Returns:
        "reference", "triton" or "native".

    Raises:
        ArgumentError: `impl` is no implementation, or the one asked for cannot run here (there is no silent fallback).
    """
    require_choice(impl, "impl", IMPLEMENTATIONS)
    if impl == "auto":
        return explain(problem)[0]
    why_not = _obstacle_of(problem, impl)
    if why_not is not None:
        runnable = [name for name in IMPLEMENTATIONS[1:] if _obstacle_of(problem, name) is None]
        raise ArgumentError(
            "impl",
            f"an implementation that can run {problem.operator} here ({', '.join(runnable)})",
            repr(impl),
            why_not,
        )
    return impl


def explain(problem: Problem) -> tuple[str, str]:
    """What `impl="auto"` takes for a call, and why.

    Returns:
        (implementation, reason).
    """
    if torch.compiler.is_exporting():
        # A kernel would bind the program to this package, and a rule's size limit a dynamic size to one side of it.
        return "reference", "an exported program is plain PyTorch, of any size, unless it names an implementation"
    reason = "no kernel was measured to be faster at this size"
    for rule in AUTO:
        if rule.operator == problem.operator and rule.device == problem.device and rule.applies(problem):
            why_not = _obstacle_of(problem, rule.implementation)
            if why_not is None:
                return rule.implementation, f"{rule.where}: {rule.reason}"
            reason = f"{rule.implementation} cannot run here: {why_not}"
    return "reference", reason


def table(device: str, dtype: torch.dtype = torch.float32, features: int = 128) -> Iterator[tuple[str, str, str]]:
    """Every operator × implementation with "runs" or the reason why not, for printing.

    Yields:
        (operator, implementation, "runs" or the obstacle).
    """
    for operator in OPERATORS:
        for implementation in IMPLEMENTATIONS[1:]:
            yield operator, implementation, obstacle(operator, implementation, device, dtype, features) or "runs"


def source_of_tiles() -> str:
    """Where the tile sizes of the Triton kernels come from on the current GPU, or why they run on none, in words."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    reason = _triton_obstacle("retrieve", "cuda", torch.float32, 64)
    if reason is not None:
        return reason
    told: str = importlib.import_module("anomem.kernels.tile_search").source(
        torch.device("cuda", torch.cuda.current_device())
    )
    return told


def _constant_obstacle(
    operator: str, implementation: str, device: str, dtype: torch.dtype, features: int
) -> str | None:
    # Loading a library cannot be traced; its outcome does not change within a process.
    return obstacle(operator, implementation, device, dtype, features)


# What the decorator torch.compiler.assume_constant_result sets. The decorator itself imports the compiler and Triton,
# most of a second that a program which compiles nothing would wait for.
_constant_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _native_obstacle(operator: str, device: str, dtype: torch.dtype) -> str | None:
    from anomem.ops import native

    if device == "cuda" and operator not in _NATIVE_CUDA_OPERATORS:
        return f"the native library has no CUDA kernel for {operator}"
    if device == "cpu" and dtype == torch.float16:
        return "the native CPU kernels take float32, bfloat16 and float64, not float16"
    if device == "cuda" and dtype == torch.float64:
        return "the native CUDA kernels take float32, bfloat16 and float16, not float64"
    return native.obstacle(device)


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
