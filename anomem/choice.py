"""What this machine has measured and proved, for `impl="auto"`: its names, the file that keeps it, and when that runs.

The environment variable ANOMEM_CHOICE
    measure   (the default) `choices.json` in the user's cache folder; what it lacks is measured at the first large call
    table     no file and no measurement: committed rows and rules only
    PATH      this file is read and never written; nothing is measured

A choice is keyed by `Bucket` within a section for one processor or GPU (the current one at the first call) and one
state of the software. A section of
another machine, torch, Triton, driver or state of the kernels is not used. The file:
{"format": 1, "sections": [{"hardware": "…", "software": "…", "choices": {BUCKET: {"implementation": "native",
"milliseconds": {"reference": 2.1, "native": 0.9}}}, "checks": {FAMILY: "passed" or what went wrong}}]}

No measurement under `torch.use_deterministic_algorithms`, while anything is traced, captured or differentiated, nor in
a job of several processes (`torch.distributed`): its ranks must not differ, so they follow the table, the rules and a
file that ANOMEM_CHOICE names.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from anomem import backends, rules
from anomem.errors import UserError, warn
from anomem.files import cache_folder, make_folder, require_writable, write_atomically

FORMAT = 1
PASSED = "passed"
_LARGE = {"cpu": 2**22, "cuda": 2**28}
"""Multiplications of one product of scores from which a call is worth a measurement, by device. On a CPU the rule for
small calls ends there."""
_LARGE_COPY = {"cpu": 2**20, "cuda": 2**24}
"""The same for the operators that only move memory, in elements."""
INFERENCE = ("deviation_map", "usage", "nearest", "read", "augment")
"""Operators without a gradient, and the read of a filled memory, whose gradient is the reference's."""
COPIES = ("gather", "variance", "augment", "batch_norm", "downsample")
T = TypeVar("T")


class Bucket(NamedTuple):
    """What a choice holds for; sizes are rounded up to powers of two."""

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


class Measured(NamedTuple):
    """The outcome of a measurement."""

    implementation: str
    milliseconds: dict[str, float]
    """Median by implementation."""
    settled: bool = True
    """Whether the times of the implementations did not overlap, or were equal: the choice is worth keeping."""

    def __str__(self) -> str:
        mine = self.milliseconds[self.implementation]
        ratios = [
            f"{milliseconds / mine:.2f} times as fast as {name}"
            for name, milliseconds in self.milliseconds.items()
            if name != self.implementation
        ]
        return ", ".join([*ratios, f"{mine:.3g} ms"])


class Section(NamedTuple):
    """What a file has for this machine."""

    choices: dict[str, Measured]
    """By the name of a bucket."""
    checks: dict[str, str]
    """By family: "passed" or what went wrong."""


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
        training and problem.operator not in INFERENCE,
    )


def family_of(operator: str, implementation: str, dtype: torch.dtype, features: int) -> str:
    """The name of what one check proves: a kernel for a dtype and lengths of rows up to a power of two."""
    return f"{implementation} {operator} {_name_of(dtype)} d {_power(features)}"


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


# The state of the process: a choice once made is not made again.
_lock = threading.RLock()
_made: dict[Bucket, backends.Choice | None] = {}
_verdicts: dict[tuple[str, str], str | None] = {}
_outcomes: dict[tuple[str, str], str] = {}
_sections: dict[str, Section] = {}


def forget() -> None:
    """Forget what this process has chosen, checked and read, and read the environment again."""
    with _lock:
        for state in (_made, _verdicts, _outcomes, _sections):
            state.clear()  # type: ignore[attr-defined]
        for cached in (mode, hardware, identity):
            cached.cache_clear()


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


def of_machine(problem: rules.Problem, training: bool) -> backends.Choice | None:
    """The choice of this machine for a call, from the file or by measuring now; None where neither is possible.

    Args:
        problem: the call.
        training: whether gradients are on.
    """
    if problem.device not in _LARGE or torch.are_deterministic_algorithms_enabled() or mode() == "table":
        return None
    bucket = bucket_of(problem, training)
    with _lock:
        if bucket not in _made:
            _made[bucket] = _from_file(problem, bucket) or _by_measuring(problem, bucket)
        return _made[bucket]


def any_known(operator: str, device: str, dtype: torch.dtype) -> bool:
    """Whether `known` can have an answer for such tensors."""
    if device not in _LARGE or torch.are_deterministic_algorithms_enabled() or _follows() is None:
        return False
    start = f"{operator} {_name_of(dtype)} "
    with _lock:
        return any(name.startswith(start) for name in _section(device).choices)


def known(bucket: Bucket) -> str | None:
    """The implementation that was chosen for a bucket in this process or its file; measures nothing."""
    bucket = bucket._replace(training=bucket.training and bucket.operator not in INFERENCE)
    with _lock:
        if bucket in _made:
            made = _made[bucket]
            return None if made is None else made.implementation
        problem = _problem_of(bucket)
        found = _from_file(problem, bucket)
        return None if found is None else found.implementation


def distrust(operator: str, implementation: str, device: str, dtype: torch.dtype, features: int) -> str | None:
    """Why a kernel must not be taken on hardware that no committed row was measured on; None if it may.

    The first call of a family checks it against float64 (`anomem.calibrate.check`) and keeps the outcome in the file.
    A failure is reported once, as a warning.
    """
    if any(rule.processor == hardware(device) for rule in rules.AUTO):
        return None
    family = family_of(operator, implementation, dtype, features)
    with _lock:
        if (device, family) in _verdicts:
            return _verdicts[device, family]
        outcome = _section(device).checks.get(family) if path() is not None else None
        if outcome is None:
            if not can_run(device):
                return "it is not checked on this hardware yet; run `python -m anomem.env --check`"
            from anomem import calibrate

            check = functools.partial(calibrate.check, operator, implementation, device, dtype, features)
            try:
                outcome = in_clean_thread(check)
            except torch.OutOfMemoryError:
                return "there was no memory to check it on this hardware"
            if mode() == "measure":
                keep(default_path(), device, checks={family: outcome})
        _outcomes[device, family] = outcome
        verdict = None if outcome == PASSED else f"it failed its check on this hardware: {outcome}"
        if verdict is not None:
            warn(
                f'{family} is switched off for impl="auto" on {hardware(device)}: {outcome}. '
                "Please report it with the output of `python -m anomem.env`"
            )
        _verdicts[device, family] = verdict
        return verdict


def outcomes(device: str) -> dict[str, str]:
    """The outcomes of the checks of this process, by family."""
    with _lock:
        return {family: _outcomes[where, family] for where, family in _outcomes if where == device}


def applies(rule: rules.Rule, device: str) -> bool:
    """Whether a rule holds for a device of this machine."""
    return rule.device == device and rule.processor in ("", hardware(device))


def kept_here(device: str) -> Section:
    """What the file that this process follows has for this machine."""
    with _lock:
        return _section(device)


def work(problem: rules.Problem) -> int:
    """Elements that a memory-bound operator moves, or multiplications of one product of scores."""
    elements = problem.groups * problem.rows * problem.features
    return elements if problem.operator in COPIES else elements * problem.columns


def is_large(problem: rules.Problem) -> bool:
    """Whether a call is worth a measurement."""
    least = _LARGE_COPY if problem.operator in COPIES else _LARGE
    return problem.device in least and work(problem) >= least[problem.device]


def candidates(problem: rules.Problem) -> list[str]:
    """The kernels that can run a call and passed their check."""
    names = ("native",) if problem.device == "cpu" else ("triton", "native")
    return [name for name in names if backends.obstacle_of_auto(problem, name) is None]


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


def _from_file(problem: rules.Problem, bucket: Bucket) -> backends.Choice | None:
    if _follows() is None:
        return None
    measured = _section(bucket.device).choices.get(bucket.name)
    if measured is None or backends.obstacle_of_auto(problem, measured.implementation) is not None:
        return None
    return backends.Choice(measured.implementation, "file", str(measured))


def _by_measuring(problem: rules.Problem, bucket: Bucket) -> backends.Choice | None:
    traced = torch._C._len_torch_dispatch_stack() > 0
    if mode() != "measure" or _is_a_job() or traced or not is_large(problem) or not can_run(problem.device):
        return None
    kernels = candidates(problem)
    if not kernels:
        return None
    from anomem import calibrate

    measured = in_clean_thread(functools.partial(calibrate.measure, problem, bucket.training, kernels))
    if measured is None:
        return None
    _section(bucket.device).choices[bucket.name] = measured
    if measured.settled:
        keep(default_path(), bucket.device, choices={bucket.name: measured})
    return backends.Choice(measured.implementation, "measured", str(measured))


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
    """The section of this machine, read once per process."""
    if device not in _sections:
        _sections[device] = Section({}, {})
        place = path()
        if place is not None:
            named = isinstance(mode(), Path)
            try:  # also around `exists`: the folder may be closed to us
                if place.exists() or named:
                    _sections[device] = read(place, device)
                    if named and _sections[device] == Section({}, {}):
                        warn(f"{_NAMED}: {place} has nothing for {' with '.join(identity(device))}; {_INSTEAD}")
            except (OSError, ValueError) as error:
                if named:
                    warn(f"{_NAMED}, expected measure, table or a file that can be read: {error}; {_INSTEAD}")
                else:
                    warn(f"no choices of this machine are used: {error}")
    return _sections[device]


_NAMED = "ANOMEM_CHOICE"
_INSTEAD = "the committed table and the rules decide"


def read(place: Path, device: str) -> Section:
    """What a file has for this machine; empty if it has nothing for it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of choices.
    """
    for section in _read_all(place):
        if (section["hardware"], section["software"]) == identity(device):
            choices = {name: Measured(c["implementation"], c["milliseconds"]) for name, c in section["choices"].items()}
            return Section(choices, section["checks"])
    return Section({}, {})


def keep(
    place: Path, device: str, choices: dict[str, Measured] | None = None, checks: dict[str, str] | None = None
) -> None:
    """`add`; a file that cannot be written gives a warning."""
    try:
        add(place, device, choices, checks)
    except UserError as error:
        warn(f"the choices of this machine are not kept: {error}")


def add(
    place: Path, device: str, choices: dict[str, Measured] | None = None, checks: dict[str, str] | None = None
) -> None:
    """Add to a file, atomically; sections of other machines stay.

    If two processes write at the same time one addition may be lost; it is measured again later.

    Raises:
        UserError: it is not a file of choices, or cannot be written.
    """
    hardware_here, software_here = identity(device)
    sections = _sections_of(place)
    section = next((s for s in sections if (s["hardware"], s["software"]) == identity(device)), None)
    if section is None:
        section = {"hardware": hardware_here, "software": software_here, "choices": {}, "checks": {}}
        # Replaces what the same hardware measured with other software.
        sections = [*(s for s in sections if s["hardware"] != hardware_here), section]
    for name, measured in (choices or {}).items():
        times = {implementation: round(ms, 5) for implementation, ms in measured.milliseconds.items()}
        section["choices"][name] = {"implementation": measured.implementation, "milliseconds": times}
    section["checks"].update(checks or {})
    make_folder(place.parent)
    write_atomically(place, (json.dumps({"format": FORMAT, "sections": sections}, indent=1) + "\n").encode())


def require_kept(place: Path) -> None:
    """Check that `add` will succeed, before minutes of measurements.

    Raises:
        UserError: it is not a file of choices, or cannot be written.
    """
    _sections_of(place)
    make_folder(place.parent)
    require_writable(place.parent)


def _sections_of(place: Path) -> list[dict[str, Any]]:
    """The sections of a file; none where there is no file."""
    try:
        return _read_all(place) if place.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; delete it, or name another file") from error


def _read_all(place: Path) -> list[dict[str, Any]]:
    """The sections of a file; raises ValueError if it is not a file of choices."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} expected, not {content['format']!r}")
        for section in content["sections"]:
            if not all(isinstance(section[field], str) for field in ("hardware", "software")):
                raise ValueError("a section names no hardware or software")
            for name, choice in section["choices"].items():
                times, implementation = choice["milliseconds"], choice["implementation"]
                if implementation not in rules.IMPLEMENTATIONS[1:] or implementation not in times:
                    raise ValueError(f"{name} names no implementation that was measured")
                if not all(isinstance(ms, float | int) and ms > 0 for ms in times.values()):
                    raise ValueError(f"{name} has a time that is no number > 0")
            if not all(isinstance(outcome, str) for outcome in section["checks"].values()):
                raise ValueError("a check has no outcome")
        sections: list[dict[str, Any]] = content["sections"]
    # Errors of JSON and UTF-8 are ValueErrors. RecursionError: thousands of brackets.
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not a file of choices ({type(error).__name__}: {error})") from None
    return sections


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def hardware(device: str) -> str:
    """The processor family with its instruction set, or the GPU: what committed rows are bound to."""
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    values = _processor_facts()
    flags = values.get("flags", "").split()
    newest = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    instructions = next((name for flag, name in newest.items() if flag in flags), None)
    instructions = instructions or torch.backends.cpu.get_cpu_capability()
    if "ANOMEM_CPU" in os.environ:  # an older set of the native kernels
        instructions += f" limited to {os.environ['ANOMEM_CPU']}"
    maker = values.get("vendor_id") or f"{platform.system()} {platform.machine()} {platform.processor()}".strip()
    family = f" family {values['cpu family']}" if "cpu family" in values else ""
    return f"{maker}{family} {instructions}"


@functools.cache
def identity(device: str) -> tuple[str, str]:
    """What a section of the file is bound to: the hardware with its model and threads, and the software."""
    from anomem.ops import native, sources

    library = native.path_of("_C.so" if device == "cpu" else "_C_cuda.so")
    built = sources.built_from(library) if library.exists() else None
    software = [f"torch {torch.__version__}", f"native library {built or 'not built'}"]
    if device != "cuda":
        values = _processor_facts()
        model = f", model {values['model']} ({values.get('model name', '')})" if "model" in values else ""
        return f"{hardware(device)}{model}, {torch.get_num_threads()} threads", ", ".join(software)
    place = hardware(device)
    if torch.cuda.is_available():
        place += " sm_{}{}".format(*torch.cuda.get_device_capability())
    if backends.obstacle("retrieve", "triton", device, torch.float32, 64) is None:
        from anomem.kernels import tile_search

        state = tile_search.identity(torch.device("cuda", torch.cuda.current_device()))
        software.append(f"Triton {state['triton']}, kernels {state['kernels']}")
    return place, ", ".join([*software, f"CUDA {torch.version.cuda}", _driver()])


def _processor_facts() -> dict[str, str]:
    """Of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = text.split("\n\n", 1)[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "unknown driver"
