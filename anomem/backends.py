"""What can run here, why not if not, and the choice behind `impl="auto"`.

Each backend answers an operator with None (it can run) or a sentence (why it cannot). `decide` asks `SOURCES` in order
for an implementation and remembers the answer:

    export    an exported program is plain PyTorch
    table     `rules.AUTO`: committed rows of this very processor or GPU, or the limits of memory
    machine   the file of this machine, else a measurement at the first large call (`anomem.choice`)
    rule      `rules.RULES`: what holds on hardware without rows; small calls, traces and captures end here

On hardware without committed rows a kernel is taken only after it passed a check against float64. The environment
variable ANOMEM_CHOICE says which sources are asked; `python -m anomem.env` prints every choice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from operator import index
from typing import NamedTuple

import torch

from anomem import rules
from anomem.errors import ArgumentError
from anomem.ops.library import in_forward_mode
from anomem.rules import IMPLEMENTATIONS, OPERATORS, Problem, Rule
from anomem.validation import require_choice

_TRITON_OPERATORS = ("retrieve", "nt_xent", "info_nce", "nearest", "read")
_NATIVE_CUDA_OPERATORS = ("retrieve", "gather", "variance", "deviation_map")


class Choice(NamedTuple):
    """What runs a call under `impl="auto"`, and where that came from."""

    implementation: str
    source: str
    """"export", "table", "file", "measured", "rule" or "default"."""
    because: Rule | str

    @property
    def reason(self) -> str:
        """Why, in words."""
        return str(self.because)


def choose(problem: Problem, impl: str, *, part: bool = False) -> str:
    """The implementation that will run a call.

    Args:
        problem: the call.
        impl: what the user asked for.
        part: the call is part of a larger computation that was asked to use `impl`: a training run with "triton" means
            Triton wherever there is a Triton kernel. An operator that has none chooses by "auto"; one that has a kernel
            which cannot run here still raises.

    Returns:
        "reference", "triton" or "native".

    Raises:
        ArgumentError: `impl` is no implementation, or the one asked for cannot run here (there is no silent fallback).
    """
    if impl == "auto":
        return decide(problem).implementation
    require_choice(impl, "impl", IMPLEMENTATIONS)
    if part and not _has_kernel(problem, impl):
        return decide(problem).implementation
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
    choice = decide(problem)
    return choice.implementation, choice.reason


def decide(problem: Problem) -> Choice:
    """What `impl="auto"` takes for a call: the answer of the first of `SOURCES` that has one, else the reference.

    A choice never changes within a process.
    """
    # A trace or a mode that records operators may come with symbolic sizes, which have no hash.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _first_answer(problem)
    call = (problem, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), in_forward_mode())
    choice = _decided.get(call)
    if choice is None:
        if len(_decided) >= _MOST_DECIDED:
            _decided.clear()  # the sources give the same answers again
        choice = _decided[call] = _first_answer(problem)
    return choice


_decided: dict[tuple[Problem, bool, bool, bool], Choice] = {}
_MOST_DECIDED = 4096


def forget() -> None:
    """Forget every choice of this process and read the environment again, for tests and calibration."""
    from anomem import choice

    _decided.clear()
    choice.forget()


def _first_answer(problem: Problem) -> Choice:
    for source in SOURCES:
        choice = source(problem)
        if choice is not None:
            return choice
    return Choice("reference", "default", "no kernel is known to be faster at this size")


def _for_export(problem: Problem) -> Choice | None:
    # A kernel would bind the program to this package, and a rule's size limit a dynamic size to one side of it.
    if torch.compiler.is_exporting():
        reason = "an exported program is plain PyTorch, of any size, unless it names an implementation"
        return Choice("reference", "export", reason)
    return None


def _from_table(problem: Problem) -> Choice | None:
    return _from_rules(rules.AUTO, "table", problem)


def _from_machine(problem: Problem) -> Choice | None:
    training = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        # Only what is known already; a dynamic size is compared with bounds where something is known.
        if not _constant_any_known(problem.operator, problem.device, problem.dtype):
            return None
        features, rows = _power(index(problem.features)), _power(problem.rows)
        columns, groups = _power(problem.columns), _power(problem.groups)
        name = _constant_known(
            problem.operator, problem.device, problem.dtype, features, rows, columns, groups, training
        )
        return None if name is None else Choice(name, "file", "known when the call was traced")
    if not isinstance(problem.rows * problem.columns * problem.groups, int):
        return None  # a symbolic size outside of torch.compile
    from anomem import choice

    return choice.of_machine(problem, training)


def _from_rule(problem: Problem) -> Choice | None:
    return _from_rules(rules.RULES, "rule", problem)


def _from_rules(lines: tuple[Rule, ...], source: str, problem: Problem) -> Choice | None:
    choice = None
    for rule in lines:
        right = rule.operator == problem.operator and rule.device == problem.device
        if right and (not rule.processor or rule.processor == _hardware(rule.device)) and rule.where.holds(problem):
            why_not = obstacle_of_auto(problem, rule.implementation)
            if why_not is None:
                return Choice(rule.implementation, source, rule)
            choice = Choice("reference", source, f"{rule.implementation} cannot run here: {why_not}")
    return choice


SOURCES: tuple[Callable[[Problem], Choice | None], ...] = (_for_export, _from_table, _from_machine, _from_rule)
"""Where a choice comes from, in this order; None passes on to the next."""


def obstacle_of_auto(problem: Problem, implementation: str) -> str | None:
    """Why `impl="auto"` does not take an implementation: it cannot run, or failed its check on this hardware."""
    why_not = _obstacle_of(problem, implementation)
    if why_not is None and implementation != "reference":
        features = index(problem.features)
        return _distrust(problem.operator, implementation, problem.device, problem.dtype, features)
    return why_not


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


def _has_kernel(problem: Problem, impl: str) -> bool:
    if impl == "triton":
        return problem.operator in _TRITON_OPERATORS
    return impl != "native" or problem.device != "cuda" or problem.operator in _NATIVE_CUDA_OPERATORS


def _obstacle_of(problem: Problem, implementation: str) -> str | None:
    # Under torch.compile with dynamic shapes a length is a symbol: index() settles the row length, on which it depends
    # what can run, and leaves the other lengths dynamic.
    features, steps = index(problem.features), index(problem.steps)
    if implementation != "reference" and in_forward_mode():
        return "forward-mode differentiation (jvp, jacfwd, hessian) runs through the reference only"
    return _constant_obstacle(problem.operator, implementation, problem.device, problem.dtype, features, steps)


def _constant_obstacle(
    operator: str, implementation: str, device: str, dtype: torch.dtype, features: int, steps: int
) -> str | None:
    # Loading a library cannot be traced; its outcome does not change within a process.
    return obstacle(operator, implementation, device, dtype, features, steps)


def _hardware(device: str) -> str:
    from anomem import choice

    return choice.hardware(device)


def _distrust(operator: str, implementation: str, device: str, dtype: torch.dtype, features: int) -> str | None:
    from anomem import choice

    return choice.distrust(operator, implementation, device, dtype, features)


def _constant_any_known(operator: str, device: str, dtype: torch.dtype) -> bool:
    from anomem import choice

    return choice.any_known(operator, device, dtype)


def _constant_known(
    operator: str,
    device: str,
    dtype: torch.dtype,
    features: int,
    rows: int,
    columns: int,
    groups: int,
    training: bool,
) -> str | None:
    from anomem import choice

    return choice.known(choice.Bucket(operator, device, dtype, features, rows, columns, groups, training))


# What the decorator torch.compiler.assume_constant_result sets; tests/test_backends.py compares. The decorator itself
# imports the compiler and Triton, most of a second that a program which compiles nothing would wait for.
_constant_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
_hardware._dynamo_marked_constant = True  # type: ignore[attr-defined]
_distrust._dynamo_marked_constant = True  # type: ignore[attr-defined]
_constant_any_known._dynamo_marked_constant = True  # type: ignore[attr-defined]
_constant_known._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _power(size: int) -> int:
    """The next power of two, by comparisons: a dynamic size of a trace has no other way and stays dynamic in bounds."""
    power = 1
    while power < size:
        power *= 2
    return power


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
