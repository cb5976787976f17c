"""This machine: its name, and the file of what it has measured and proved.

A section of the file is of one processor or GPU (the current one at the first call) and one state of the software. A
section of another machine, torch, Triton, driver or state of the kernels is not used. The file:
{"format": 1, "sections": [{"hardware": "…", "software": "…", "choices": {BUCKET: {"implementation": "native",
"milliseconds": {"reference": 2.1, "native": 0.9}}}, "checks": {FAMILY: "passed" or what went wrong}}]}
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anomem import obstacles, rules
from anomem.errors import UserError, warn
from anomem.files import make_folder, require_writable, write_atomically

FORMAT = 1
PASSED = "passed"
_NAME = re.compile(r"\w+ (?P<dtype>\w+) \d+ x \d+ x \d+ x \d+ (training|inference)", re.ASCII)
"""Of a call, as `anomem.choice.Bucket` has it."""


class Measured(NamedTuple):
    """The outcome of a measurement."""

    implementation: str
    milliseconds: dict[str, float]
    """Median by implementation."""
    settled: bool = True
    """Whether the times of the implementations did not overlap, or were equal: the choice is worth keeping."""

    def __str__(self) -> str:
        mine = self.milliseconds[self.implementation]
        ratios = {
            name: milliseconds / mine for name, milliseconds in self.milliseconds.items() if name != self.implementation
        }
        words = [
            f"{ratio:.2f} times as fast as {name}" if ratio >= 1 else f"as fast as {name} within {1 - ratio:.0%}"
            for name, ratio in ratios.items()
        ]
        return ", ".join([*words, f"{mine:.3g} ms"])


class Section(NamedTuple):
    """What a file has for this machine."""

    choices: dict[str, Measured]
    """By the name of a bucket."""
    checks: dict[str, str]
    """By family: "passed" or what went wrong."""


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


def identity(device: str) -> tuple[str, str]:
    """What a section of the file is bound to: the hardware with its model and current threads, and the software."""
    return _identity(device, torch.get_num_threads())


@functools.cache
def _identity(device: str, threads: int) -> tuple[str, str]:
    from anomem.ops import native, sources

    library = native.path_of("_C.so" if device == "cpu" else "_C_cuda.so")
    built = sources.built_from(library) if library.exists() else None
    software = [f"torch {torch.__version__}", f"native library {built or 'not built'}"]
    if device != "cuda":
        values = _processor_facts()
        model = f", model {values['model']} ({values.get('model name', '')})" if "model" in values else ""
        return f"{hardware(device)}{model}, {threads} threads", ", ".join(software)
    place = hardware(device)
    if torch.cuda.is_available():
        place += " sm_{}{}".format(*torch.cuda.get_device_capability())
    if obstacles.obstacle("retrieve", "triton", device, torch.float32, 64) is None:
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


def forget() -> None:
    """Read the names of the hardware and the software again."""
    hardware.cache_clear()
    _identity.cache_clear()


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
                named = _NAME.fullmatch(name)
                if named is None or not isinstance(getattr(torch, named["dtype"], None), torch.dtype):
                    raise ValueError(f"{name!r} names no call")
                times, implementation = choice["milliseconds"], choice["implementation"]
                if implementation not in rules.IMPLEMENTATIONS[1:] or implementation not in times:
                    raise ValueError(f"{name} names no implementation that was measured")
                if not all(type(ms) in (float, int) and 0 < ms < math.inf for ms in times.values()):
                    raise ValueError(f"{name} has a time that is no number > 0")
            if not all(isinstance(outcome, str) for outcome in section["checks"].values()):
                raise ValueError("a check has no outcome")
        sections: list[dict[str, Any]] = content["sections"]
    # Errors of JSON and UTF-8 are ValueErrors. RecursionError: thousands of brackets.
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not a file of choices ({type(error).__name__}: {error})") from None
    return sections
