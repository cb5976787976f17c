"""What this machine has measured and proved, for `impl="auto"`, and when it measures and proves.

The environment variable ANOMEM_CHOICE
    measure   (the default) `choices.json` in the user's cache folder; what it lacks is measured at the first large call
    table     no file and no measurement: committed rows and rules only
    PATH      this file is read and never written; nothing is measured

A choice is keyed by `Bucket`, within what the file has for this machine (`anomem.machine`).

No measurement under `torch.use_deterministic_algorithms`, in a trace, a graph capture, a mode that records operators or
a backward pass, nor in a job of several processes (`torch.distributed`): its ranks must not differ, so they follow the
table, the rules and a file that ANOMEM_CHOICE names.

A choice stays for the process. What torch.compile traced before it was made keeps the rule; a new trace takes it.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import index
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from anomem import machine, obstacles, rules
from anomem.errors import warn
from anomem.files import cache_folder
from anomem.machine import Measured, Section

_LARGE = {"cpu": 2**22, "cuda": 2**28}
"""Multiplications of one product of scores from which a call is worth a measurement, by device. On a CPU the rule for
small calls ends there."""
_LARGE_COPY = {"cpu": 2**20, "cuda": 2**24}
"""The same for the operators that only move memory, in elements."""
_INSTEAD = "the committed table and the rules decide"
"""Where a file that the user names cannot be followed."""
T = TypeVar("T")


class Bucket(NamedTuple):
    """What a choice holds for; sizes are rounded up to powers of two.

    A call is measured with the defaults of its operator; those without normalisation share its choice. Of 64 queries
    and 2048 prototypes the kernel is 1.3 times as fast as the reference with layer norm, and as fast without (in a
    trial on Intel family 6).
    """

    operator: str
    device: str
    dtype: torch.dtype
    features: int
    rows: int
    columns: int
    groups: int
    training: bool
    """Whether gradients are on."""

    @property
    def name(self) -> str:
        """The key of the file."""
        passes = "training" if self.training else "inference"
        sizes = f"{self.groups} x {self.rows} x {self.columns} x {self.features}"
        return f"{self.operator} {_name_of(self.dtype)} {sizes} {passes}"


def problem_named(name: str, device: str) -> rules.Problem:
    """The largest call of the bucket of this name."""
    operator, dtype, groups, _, rows, _, columns, _, features, _ = name.split()
    sizes = int(features), int(rows), int(columns), int(groups)
    return rules.Problem(operator, device, getattr(torch, dtype), *sizes)


class Choice(NamedTuple):
    """What runs a call under `impl="auto"`, and where that came from."""

    implementation: str
    source: str
    """"export", "table", "run", "file", "measured", "rule" or "default"."""
    because: rules.Rule | str

    @property
    def reason(self) -> str:
        """Why, in words."""
        return str(self.because)


def bucket_of(problem: rules.Problem, training: bool) -> Bucket:
    """The bucket of a call."""
    return Bucket(
        problem.operator,
        problem.device,
        problem.dtype,
        _power(problem.features),
        _power(problem.rows),
        _power(problem.columns),
        _power(problem.groups),
        training and problem.operator not in rules.INFERENCE,
    )


def family_of(operator: str, implementation: str, dtype: torch.dtype, features: int) -> str:
    """The name of what one check proves: a kernel for a dtype and lengths of rows up to a power of two."""
    return f"{implementation} {operator} {_name_of(dtype)} d {_power(features)}"


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


# The state of the process: a choice once made is not made again.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# Another thread may hold the lock while a process forks, and is not there in the child to give it back.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_made: dict[Bucket, Choice | None] = {}
_verdicts: dict[tuple[str, str], str | None] = {}
_outcomes: dict[tuple[str, str], str] = {}
_sections: dict[tuple[str, int], Section] = {}
"""By device and threads."""


def forget() -> None:
    """Forget what this process has chosen, checked and read, and read the environment again."""
    with _lock:
        for state in (_made, _verdicts, _outcomes, _sections):
            state.clear()  # type: ignore[attr-defined]
        mode.cache_clear()
        machine.forget()


@functools.cache
def mode() -> Literal["measure", "table"] | Path:
    """What ANOMEM_CHOICE says; read once."""
    value = os.environ.get("ANOMEM_CHOICE", "")
    if value in ("", "measure"):
        return "measure"
    return "table" if value == "table" else Path(os.path.expanduser(value))


def path() -> Path | None:
    """The file of choices that this process follows; None under ANOMEM_CHOICE=table."""
    how = mode()
    if how == "table":
        return None
    return default_path() if how == "measure" else how


def default_path() -> Path:
    """The file of this user and machine."""
    return cache_folder() / "choices.json"


def of_machine(problem: rules.Problem, training: bool) -> Choice | None:
    """The choice of this machine for a large call, from the file or by measuring now; None where neither is possible.

    A call that the chosen kernel cannot run gets None too, and decides nothing for the others of its bucket. Nor does
    one of fake tensors, for which nothing is measured.

    Args:
        problem: the call.
        training: whether gradients are on.
    """
    if problem.device not in _LARGE or torch.are_deterministic_algorithms_enabled() or mode() == "table":
        return None
    if not is_large(problem):
        return None
    bucket = bucket_of(problem, training)
    with _lock:
        if problem.fake and bucket not in _made:
            return _from_file(problem, bucket)
        if bucket not in _made:
            _choose(problem, bucket)
        return _runnable(problem, _made.get(bucket))


def _choose(problem: rules.Problem, bucket: Bucket) -> None:
    """Take the bucket's choice from the file or measure; decide nothing if this call can run no kernel."""
    found = _from_file(problem, bucket)
    if found is not None:
        _made[bucket] = found
        return
    kernels = candidates(problem)
    if not kernels:
        return
    _made[bucket] = None  # what a trace or a backward pass chooses by the rules stays chosen
    measured = _measured(problem, bucket, kernels)
    if measured is None:
        return
    _made[bucket] = _as_choice(measured, "measured")
    _section(bucket.device).choices[bucket.name] = measured
    if measured.settled:  # last: its warning may be an error
        machine.keep(default_path(), bucket.device, choices={bucket.name: measured})


def choices_made(device: str) -> dict[str, Any]:
    """The choices of this process and what they hold for, as plain values: a run keeps them, to go on with the same."""
    hardware, software = machine.identity(device)
    with _lock:
        choices = {
            bucket.name: found.implementation for bucket, found in _made.items() if found and bucket.device == device
        }
    return {"device": device, "hardware": hardware, "software": software, "choices": choices}


def follow(before: Mapping[str, Any]) -> None:
    """Take choices that another process has made, where this one has made none; none of another machine.

    Args:
        before: from `choices_made`.
    """
    device = before["device"]
    if (before["hardware"], before["software"]) != machine.identity(device):
        return
    with _lock:
        for name, implementation in before["choices"].items():
            training = name.endswith(" training")
            _made.setdefault(
                bucket_of(problem_named(name, device), training), Choice(implementation, "run", "as the run began")
            )


def any_known(operator: str, device: str, dtype: torch.dtype) -> bool:
    """Whether `known` can have an answer for such tensors."""
    if device not in _LARGE or torch.are_deterministic_algorithms_enabled() or _follows() is None:
        return False
    start = f"{operator} {_name_of(dtype)} "
    with _lock:
        names = [*_section(device).choices, *(bucket.name for bucket in _made if bucket.device == device)]
    return any(name.startswith(start) for name in names)


def known(bucket: Bucket) -> str | None:
    """The implementation that was chosen for a bucket in this process or its file; measures nothing."""
    bucket = bucket._replace(training=bucket.training and bucket.operator not in rules.INFERENCE)
    with _lock:
        found = _made[bucket] if bucket in _made else _from_file(_problem_of(bucket), bucket)
        return None if found is None else found.implementation


def distrust(operator: str, implementation: str, device: str, dtype: torch.dtype, features: int) -> str | None:
    """Why a kernel must not be taken on hardware that no committed row was measured on; None if it may.

    The first call of a family checks it against float64 (`anomem.measuring.check`) and keeps the outcome in the file.
    A failure is reported once, as a warning.
    """
    if any(rule.processor == machine.hardware(device) for rule in rules.AUTO):
        return None
    family = family_of(operator, implementation, dtype, features)
    with _lock:
        if (device, family) in _verdicts:
            return _verdicts[device, family]
        outcome = _section(device).checks.get(family) if path() is not None else None
        checked = False
        if outcome is None:
            if not can_run(device):
                return "it is not checked on this hardware yet; run `python -m anomem.env --check`"
            from anomem import measuring

            check = functools.partial(measuring.check, operator, implementation, device, dtype, features)
            try:
                outcome = in_clean_thread(check)
            except torch.OutOfMemoryError:
                return "there was no memory to check it on this hardware"
            checked = True
        _outcomes[device, family] = outcome
        verdict = None if outcome == machine.PASSED else f"it failed its check on this hardware: {outcome}"
        _verdicts[device, family] = verdict  # before warnings, which may be errors
        if checked and mode() == "measure":
            machine.keep(default_path(), device, checks={family: outcome})
        if verdict is not None:
            warn(
                f'{family} is switched off for impl="auto" on {machine.hardware(device)}: {outcome}. '
                "Please report it with the output of `python -m anomem.env`"
            )
        return verdict


def obstacle_of_auto(problem: rules.Problem, implementation: str) -> str | None:
    """Why `impl="auto"` does not take an implementation: it cannot run, or failed its check on this hardware."""
    why_not = obstacles.obstacle_of(problem, implementation)
    if why_not is None and implementation != "reference":
        features = index(problem.features)
        return _distrust(problem.operator, implementation, problem.device, problem.dtype, features)
    return why_not


def _distrust(operator: str, implementation: str, device: str, dtype: torch.dtype, features: int) -> str | None:
    return distrust(operator, implementation, device, dtype, features)


_distrust._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in anomem/obstacles.py


def outcomes(device: str) -> dict[str, str]:
    """The outcomes of the checks of this process, by family."""
    with _lock:
        return {family: _outcomes[where, family] for where, family in _outcomes if where == device}


def applies(rule: rules.Rule, device: str) -> bool:
    """Whether a rule holds for a device of this machine."""
    return rule.device == device and rule.processor in ("", machine.hardware(device))


def is_covered(problem: rules.Problem) -> bool:
    """Whether committed rows of this hardware decide a call, before any measurement."""
    return any(applies(rule, problem.device) and rule.holds(problem) for rule in rules.AUTO)


def kept_here(device: str) -> Section:
    """What the file that this process follows has for this machine."""
    with _lock:
        return _section(device)


def is_large(problem: rules.Problem) -> bool:
    """Whether a call is worth a measurement."""
    least = _LARGE_COPY if problem.operator in rules.COPIES else _LARGE
    return problem.device in least and rules.work(problem) >= least[problem.device]


def candidates(problem: rules.Problem) -> list[str]:
    """The kernels that can run a call and passed their check."""
    names = ("native",) if problem.device == "cpu" else ("triton", "native")
    return [name for name in names if obstacle_of_auto(problem, name) is None]


def can_run(device: str) -> bool:
    """Whether a computation of our own may run now: not inside a CUDA graph's capture or a backward pass.

    A backward pass of ours would wait for the thread of the device, which waits for us.
    """
    if torch._C._current_graph_task_id() != -1:
        return False
    return device == "cpu" or (torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing())


def in_clean_thread(call: Callable[[], T]) -> T:
    """Run a call in a thread of its own: no autocast, transform, mode or hook of the caller is on there."""
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> T:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _from_file(problem: rules.Problem, bucket: Bucket) -> Choice | None:
    if _follows() is None:
        return None
    measured = _section(bucket.device).choices.get(bucket.name)
    return None if measured is None else _runnable(problem, _as_choice(measured, "file"))


def _as_choice(measured: Measured, source: str) -> Choice:
    return Choice(measured.implementation, source, str(measured))


def _runnable(problem: rules.Problem, made: Choice | None) -> Choice | None:
    """A choice, if its implementation can run this call: its bucket says nothing of reads or forward mode."""
    return None if made is None or obstacle_of_auto(problem, made.implementation) is not None else made


def _measured(problem: rules.Problem, bucket: Bucket, kernels: list[str]) -> Measured | None:
    traced = torch._C._len_torch_dispatch_stack() > 0
    if mode() != "measure" or _is_a_job() or traced or not can_run(problem.device):
        return None
    from anomem import measuring

    return in_clean_thread(functools.partial(measuring.measure, problem, bucket.training, kernels))


def _problem_of(bucket: Bucket) -> rules.Problem:
    operator, device, dtype, features, rows, columns, groups, _ = bucket
    return rules.Problem(operator, device, dtype, features, rows, columns, groups)


def _is_a_job() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _follows() -> Path | None:
    """The file whose choices this process follows: the ranks of a job follow only one that the user names."""
    return None if mode() == "measure" and _is_a_job() else path()


def _section(device: str) -> Section:
    """The section of this machine with its current threads, read once per process."""
    key = device, torch.get_num_threads()
    if key not in _sections:
        _sections[key] = Section({}, {})
        place = path()
        if place is not None:
            named = isinstance(mode(), Path)
            try:  # also around `exists`: the folder may be closed to us
                if place.exists() or named:
                    _sections[key] = machine.read(place, device)
                    if named and _sections[key] == Section({}, {}):
                        here = " with ".join(machine.identity(device))
                        warn(f"ANOMEM_CHOICE: {place} has nothing for {here}; {_INSTEAD}")
            except (OSError, ValueError) as error:
                if named:
                    warn(f"ANOMEM_CHOICE, expected measure, table or a file that can be read: {error}; {_INSTEAD}")
                else:
                    warn(f"no choices of this machine are used: {error}")
    return _sections[key]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
