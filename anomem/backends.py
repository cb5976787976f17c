"""What can run here, why not if not, and the choice behind `impl="auto"`.

Each backend answers an operator with None (it can run) or a sentence (why it cannot). `decide` asks `SOURCES` in order
for an implementation and remembers the answer:

    export    an exported program is plain PyTorch
    table     `AUTO`: committed rows of this very processor or GPU, or the limits of memory
    machine   the file of this machine, else a measurement at the first large call (`anomem.choice`)
    rule      `RULES`: what holds on hardware without rows; small calls, traces and captures end here

On hardware without committed rows a kernel is taken only after it passed a check against float64. The environment
variable ANOMEM_CHOICE says which sources are asked; `python -m anomem.env` prints every choice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Literal, NamedTuple, get_args

import torch

from anomem.errors import ArgumentError
from anomem.ops.library import in_forward_mode
from anomem.validation import require_choice

Impl = Literal["auto", "reference", "triton", "native"]
IMPLEMENTATIONS: tuple[Impl, ...] = get_args(Impl)
OPERATORS = (
    "retrieve",
    "shrink",
    "nt_xent",
    "info_nce",
    "gather",
    "variance",
    "deviation_map",
    "usage",
    "nearest",
    "read",
)
_TRITON_OPERATORS = ("retrieve", "nt_xent", "info_nce", "nearest", "read")
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
    steps: int = 1
    """Reads of the memory."""


@dataclass(frozen=True)
class Where:
    """For which problems a rule holds; `str` says it in words. A bound of 0 or None does not bind."""

    dtypes: tuple[torch.dtype, ...] = ()
    """All where empty."""
    rows: int = 0
    """At least."""
    columns: int = 0
    """At least."""
    features: int = 0
    """At least."""
    most_features: int | None = None
    most_columns: int | None = None
    most_work: int | None = None
    """groups × rows × columns × features at most, an axis that the operator lacks counting 1."""
    scores_of_a_group: int = 0
    """rows × columns at least."""
    scores: int = 0
    """groups × rows × columns at least."""

    def holds(self, problem: Problem) -> bool:
        """Whether a problem is one of these."""
        # A bound that does not bind is not compared: under torch.compile a comparison would guard a dynamic size.
        return (
            (not self.dtypes or problem.dtype in self.dtypes)
            and (not self.rows or problem.rows >= self.rows)
            and (not self.columns or problem.columns >= self.columns)
            and (not self.features or problem.features >= self.features)
            and (self.most_features is None or problem.features <= self.most_features)
            and (self.most_columns is None or problem.columns <= self.most_columns)
            and (self.most_work is None or _work(problem) <= self.most_work)
            and (not self.scores_of_a_group or problem.rows * problem.columns >= self.scores_of_a_group)
            and (not self.scores or problem.groups * problem.rows * problem.columns >= self.scores)
        )

    def __str__(self) -> str:
        bounds = [
            ("rows", self.rows),
            ("columns", self.columns),
            ("features", self.features),
            ("rows × columns", self.scores_of_a_group),
            ("groups × rows × columns", self.scores),
        ]
        words = [" or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)] if self.dtypes else []
        words += [f"{name} ≥ {_number(least)}" for name, least in bounds if least]
        limits = [
            ("features", self.most_features),
            ("columns", self.most_columns),
            ("groups × rows × columns × features", self.most_work),
        ]
        words += [f"{name} ≤ {_number(most)}" for name, most in limits if most is not None]
        return ", ".join(words) or "always"


def _work(problem: Problem) -> int:
    size = problem.features
    for length in (problem.rows, problem.columns, problem.groups):
        size *= length if length else 1
    return size


class Rule(NamedTuple):
    """One line of the auto table: on this device this implementation is taken where the condition holds."""

    operator: str
    device: str
    implementation: Impl
    where: Where
    reason: str
    processor: str = ""
    """The processor or GPU whose rows the rule quotes, as `anomem.choice.processor` names it; "" for any."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


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


_MEASURED = (torch.float32, torch.bfloat16)
_HALF = (torch.bfloat16, torch.float16)
_FASTEST = "the fastest in every row it covers of benchmarks/results/cpu-*.jsonl (one processor, 2 threads)"
_ROWS = "AuthenticAMD family 26 AVX512-BF16"
"""The processor of those rows."""
_FASTEST_ZEN4 = "the fastest in every row it covers of benchmarks/results/cpu-zen4-*.jsonl (one processor, one thread)"
_ROWS_ZEN4 = "AuthenticAMD family 25 AVX512-BF16"


def _beyond_a_gpu(operator: str, bytes_per_score: int) -> Rule:
    """A kernel is taken on every GPU where plain PyTorch exceeds the memory of most.

    Args:
        operator: whose rule.
        bytes_per_score: what plain PyTorch holds at the peak of both passes; counted by tests/stand_in and in
            benchmarks/results/cuda-counts.jsonl.
    """
    return Rule(
        operator,
        "cuda",
        "triton",
        Where(scores=2**33),
        f"plain PyTorch takes {bytes_per_score} bytes a score for both passes, {8 * bytes_per_score} GiB and more, and "
        "the memory of the kernel does not grow with their number (counted, not timed on a GPU yet)",
    )


# A test compares the CPU's rules with the committed rows, forward and backward.
AUTO: tuple[Rule, ...] = (
    Rule("retrieve", "cpu", "native", Where(_MEASURED, rows=1024, columns=64, features=64), _FASTEST, _ROWS),
    Rule("shrink", "cpu", "native", Where(_MEASURED, rows=8192, columns=512, features=64), _FASTEST, _ROWS),
    Rule("nt_xent", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule("info_nce", "cpu", "native", Where(_MEASURED, scores_of_a_group=2**20), _FASTEST, _ROWS),
    Rule("gather", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule("variance", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule("deviation_map", "cpu", "native", Where(_MEASURED, most_features=256), _FASTEST, _ROWS),
    Rule("usage", "cpu", "native", Where(_MEASURED), _FASTEST, _ROWS),
    Rule(
        "retrieve",
        "cpu",
        "native",
        Where(_MEASURED, rows=1024, columns=64, features=64, most_features=512, most_columns=512),
        _FASTEST_ZEN4,
        _ROWS_ZEN4,
    ),
    Rule("nt_xent", "cpu", "native", Where(_MEASURED, columns=256), _FASTEST_ZEN4, _ROWS_ZEN4),
    Rule("info_nce", "cpu", "native", Where(_MEASURED, columns=1024, features=128), _FASTEST_ZEN4, _ROWS_ZEN4),
    _beyond_a_gpu("retrieve", 16),
    _beyond_a_gpu("nt_xent", 21),
    _beyond_a_gpu("info_nce", 21),
)

_TRAFFIC = "plain PyTorch moves 24 to 68 bytes a score, the kernel none (arithmetic, not measured on a GPU yet)"
_LAUNCHES = "bound by memory and launches: a fifth of the launches, at most half the bytes (not measured on a GPU yet)"
_SMALL = "its fixed cost is below that of the reference's many operators (benchmarks/results/cpu-zen4-small.jsonl)"
_SMALL_CALL = Where(_MEASURED, most_features=512, most_columns=512, most_work=2**22)
_ONE_PRODUCT = "no matrix of scores, and one product (benchmarks/results/memories.jsonl; AMD family 25)"
_CHUNKS = "scores in chunks of at most 256 MiB, selected from in one pass (not measured on a GPU yet)"
RULES: tuple[Rule, ...] = (
    *(Rule(operator, "cpu", "native", _SMALL_CALL, _SMALL) for operator in OPERATORS),
    Rule(
        "nt_xent",
        "cpu",
        "native",
        Where(_MEASURED, columns=1024, most_features=256),
        "at least 2.3 times as fast as eager PyTorch on every processor measured (AMD family 26; Intel family 6, AMX)",
    ),
    Rule("nearest", "cpu", "native", Where(_MEASURED), _ONE_PRODUCT),
    Rule("read", "cpu", "native", Where(_MEASURED), _ONE_PRODUCT),
    Rule("nearest", "cuda", "triton", Where(scores=2**22), _CHUNKS),
    Rule("read", "cuda", "triton", Where(scores=2**22), _CHUNKS),
    Rule("nt_xent", "cuda", "triton", Where(_HALF, most_features=128), _TRAFFIC),
    Rule("info_nce", "cuda", "triton", Where(_HALF, most_features=128), _TRAFFIC),
    Rule("retrieve", "cuda", "triton", Where(_HALF, most_features=128, scores=2**22), _TRAFFIC),
    Rule("gather", "cuda", "native", Where(), _LAUNCHES),
    Rule("variance", "cuda", "native", Where(), _LAUNCHES),
)
"""What is taken where nothing was measured."""


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
    return _from_rules(AUTO, "table", problem)


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
    return _from_rules(RULES, "rule", problem)


def _from_rules(rules: tuple[Rule, ...], source: str, problem: Problem) -> Choice | None:
    choice = None
    for rule in rules:
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


def _number(value: int) -> str:
    power = value.bit_length() - 1
    return f"2^{power}" if value == 2**power and power >= 16 else str(value)


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
