"""Which implementation runs a call: the one that is named, or the choice behind `impl="auto"`.

`decide` asks `SOURCES` in order for an implementation and remembers the answer:

    export    an exported program is plain PyTorch
    table     `rules.AUTO`: committed rows of this processor family or GPU, or the limits of memory
    machine   the file of this machine, else a measurement at the first large call (`anomem.choice`)
    rule      `rules.RULES`: what holds on hardware without rows; small calls, traces and captures end here

On hardware without committed rows a kernel is taken only after it passed a check against float64. The environment
variable ANOMEM_CHOICE says which sources are asked; `python -m anomem.env` prints every choice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import index
from typing import Any

import torch

from anomem import choice, machine, obstacles, rules
from anomem.choice import Choice
from anomem.errors import ArgumentError
from anomem.ops.library import in_forward_mode
from anomem.rules import IMPLEMENTATIONS, Problem, Rule
from anomem.validation import require_choice


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
    if part and not obstacles.has_kernel(problem, impl):
        return decide(problem).implementation
    why_not = obstacles.obstacle_of(problem, impl)
    if why_not is not None:
        runnable = [name for name in IMPLEMENTATIONS[1:] if obstacles.obstacle_of(problem, name) is None]
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
    made = decide(problem)
    return made.implementation, made.reason


def decide(problem: Problem) -> Choice:
    """What `impl="auto"` takes for a call: the answer of the first of `SOURCES` that has one, else the reference.

    A choice never changes within a process.
    """
    # A trace, fake tensors and a mode that records operators may come with symbolic sizes, which have no hash.
    if torch.compiler.is_compiling() or problem.fake or torch._C._len_torch_dispatch_stack():
        return _first_answer(problem)
    call = (problem, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), in_forward_mode())
    made = _decided.get(call)
    if made is None:
        if len(_decided) >= _MOST_DECIDED:
            _decided.clear()  # the sources give the same answers again
        made = _decided[call] = _first_answer(problem)
    return made


_decided: dict[tuple[Problem, bool, bool, bool], Choice] = {}
_MOST_DECIDED = 4096


def remember(kind: Hashable | None, call: Any) -> None:
    """Remember how calls of a kind are run, whose checks and choice are done.

    Args:
        kind: of `anomem.functional._inputs.kind_of_call`; None is not remembered.
        call: what runs them, as the operator wants it back.
    """
    if kind is None:
        return
    if len(_of_kinds) >= _MOST_DECIDED:
        _of_kinds.clear()
    _of_kinds[kind] = call


def remembered(kind: Hashable | None) -> Any:
    """What `remember` was told of a kind, or None."""
    return None if kind is None else _of_kinds.get(kind)


_of_kinds: dict[Hashable, Any] = {}


def forget() -> None:
    """Forget every choice of this process and read the environment again, for tests and calibration."""
    _decided.clear()
    _of_kinds.clear()
    choice.forget()


def _first_answer(problem: Problem) -> Choice:
    for source in SOURCES:
        answer = source(problem)
        if answer is not None:
            return answer
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
        known = _constant_any_known(problem.operator, problem.device, problem.dtype)
        if not known or not choice.is_large(problem):
            return None
        features, rows = _power(index(problem.features)), _power(problem.rows)
        columns, groups = _power(problem.columns), _power(problem.groups)
        name = _constant_known(
            problem.operator, problem.device, problem.dtype, features, rows, columns, groups, training
        )
        if name is None or choice.obstacle_of_auto(problem, name) is not None:
            return None
        return Choice(name, "file", "known when the call was traced")
    if not isinstance(problem.rows * problem.columns * problem.groups, int):
        return None  # a symbolic size outside of torch.compile
    return choice.of_machine(problem, training)


def _from_rule(problem: Problem) -> Choice | None:
    return _from_rules(rules.RULES, "rule", problem)


def _from_rules(lines: tuple[Rule, ...], source: str, problem: Problem) -> Choice | None:
    answer = None
    for rule in lines:
        right = rule.operator == problem.operator and rule.device == problem.device
        if right and (not rule.processor or rule.processor == _hardware(rule.device)) and rule.where.holds(problem):
            why_not = choice.obstacle_of_auto(problem, rule.implementation)
            if why_not is None:
                return Choice(rule.implementation, source, rule)
            answer = Choice("reference", source, f"{rule.implementation} cannot run here: {why_not}")
    return answer


SOURCES: tuple[Callable[[Problem], Choice | None], ...] = (_for_export, _from_table, _from_machine, _from_rule)
"""Where a choice comes from, in this order; None passes on to the next."""


def _hardware(device: str) -> str:
    return machine.hardware(device)


def _constant_any_known(operator: str, device: str, dtype: torch.dtype) -> bool:
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
    return choice.known(choice.Bucket(operator, device, dtype, features, rows, columns, groups, training))


# What the decorator torch.compiler.assume_constant_result sets; tests/test_backends.py compares. The decorator itself
# imports the compiler and Triton, most of a second that a program which compiles nothing would wait for.
_hardware._dynamo_marked_constant = True  # type: ignore[attr-defined]
_constant_any_known._dynamo_marked_constant = True  # type: ignore[attr-defined]
_constant_known._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _power(size: int) -> int:
    """The next power of two, by comparisons: a dynamic size of a trace has no other way and stays dynamic in bounds."""
    power = 1
    while power < size:
        power *= 2
    return power
