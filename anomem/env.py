"""`python -m anomem.env`: what this machine can run, what it chooses and why; `--check` checks and measures first."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import anomem
from anomem import calibrate, choice, machine, obstacles, rules
from anomem.files import discard_output

_LIBRARIES = ("torch", "torchvision", "triton", "numpy", "scikit-learn", "scikit-image", "matplotlib", "tensorboard")


def versions() -> list[tuple[str, str]]:
    """Name and version of everything that matters to a result, "not installed" where it is missing."""
    rows = [("anomem", anomem.__version__), ("python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", torch.version.cuda or "none"))
    rows.append(("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"))
    rows.append(("tiles of the Triton kernels", obstacles.source_of_tiles()))
    rows.append(("torch threads", str(torch.get_num_threads())))
    rows.append(("CPU capability", torch.backends.cpu.get_cpu_capability()))
    for tool, purpose in (("c++", "builds the CPU kernels"), ("nvcc", "builds the CUDA kernels")):
        rows.append((tool, shutil.which(tool) or f"not found; it {purpose}"))
    return rows


def gain_of(rule: rules.Rule) -> str:
    """By how much a rule of the table wins in the committed rows; empty for a rule without rows."""
    if rule.key not in _gains():
        return ""
    least, most, cases, threads = _gains()[rule.key]
    of = f"{cases} cases of the committed rows, {threads} thread" + "s" * (threads > 1)
    return f"{least:.2f} to {most:.2f} times as fast as plain PyTorch at its fastest ({of})"


@functools.cache
def _gains() -> dict[str, tuple[float, float, int, int]]:
    path = Path(__file__).with_name("gains.json")
    gains: dict[str, tuple[float, float, int, int]] = json.loads(path.read_text(encoding="utf-8"))
    return gains


def choices(device: str) -> list[dict[str, str]]:
    """What `impl="auto"` takes on a device, in the order in which it is asked.

    Returns:
        For each rule of this hardware and each bucket of this machine's file that no rule of the table covers: call,
        takes, source and because.
    """
    rows = [_of_rule(rule, "table") for rule in rules.AUTO if choice.applies(rule, device)]
    for name, measured in choice.kept_here(device).choices.items():
        if not choice.is_covered(choice.problem_named(name, device)):
            rows.append({"call": name, "takes": measured.implementation, "source": "file", "because": str(measured)})
    rows += [_of_rule(rule, "rule") for rule in rules.RULES if choice.applies(rule, device)]
    rest = (
        "a large call is measured at its first use" if choice.mode() == "measure" else "nothing is known to be faster"
    )
    return [*rows, {"call": "any other", "takes": "reference", "source": "default", "because": rest}]


def _of_rule(rule: rules.Rule, source: str) -> dict[str, str]:
    call = f"{rule.operator}, {rule.where}"
    return {"call": call, "takes": rule.implementation, "source": source, "because": gain_of(rule) or rule.reason}


def about() -> dict[str, Any]:
    """Everything that the command prints."""
    return {
        "versions": dict(versions()),
        "devices": {
            device: {
                "hardware": machine.hardware(device),
                "file": str(choice.path() or "none: ANOMEM_CHOICE=table"),
                "runs": [list(row) for row in obstacles.table(device)],
                "choices": choices(device),
                "checks": choice.kept_here(device).checks,
            }
            for device in calibrate.devices()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print versions, which implementation runs which operator and why not, and every choice of impl="auto"."""
    parser = argparse.ArgumentParser(prog="python -m anomem.env", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="first check and measure the kernels on this machine")
    parser.add_argument(
        "--seconds", type=calibrate.positive, default=60.0, help="of --check, for each device (default: 60)"
    )
    options: Any = parser.parse_args(arguments)
    if options.check:
        code = calibrate.run(calibrate.devices(), choice.path() or choice.default_path(), options.seconds)
        if code:
            return code
    found = about()
    try:
        if options.json:
            print(json.dumps(found, indent=1))
        else:
            _print(found)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        discard_output()
        return 141
    return 0


def _joined(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of `choices` in which neighbours that differ in their operator alone are one row."""
    joined: list[dict[str, str]] = []
    before: tuple[str, ...] = ()
    for row in rows:
        operator, _, where = row["call"].partition(", ")
        rest = (where, row["takes"], row["source"], row["because"])
        if where and rest == before:
            head = joined[-1]["call"].removesuffix(f", {where}")
            joined[-1] = {**row, "call": f"{head}, {operator}, {where}"}
        else:
            joined.append(row)
        before = rest
    return joined


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    here = Table("what", "version or place", title="This machine")
    for row in found["versions"].items():
        here.add_row(*row)
    console.print(here)
    for device, of_device in found["devices"].items():
        runs = Table("operator", "implementation", "runs here?", title=f"float32 tensors on {device}")
        for operator, implementation, answer in of_device["runs"]:
            runs.add_row(operator, implementation, answer, style=None if answer.startswith("runs") else "dim")
        console.print(runs)
        auto = Table("call", "takes", "source", title=f'impl="auto" on {device}: {of_device["hardware"]}')
        auto.add_column("because", overflow="fold")  # paths are longer than the column
        for row in _joined(of_device["choices"]):
            auto.add_row(*row.values())
        console.print(auto)
        if any(row["source"] == "file" for row in of_device["choices"]):
            sizes = "Sizes of the file: groups x rows x columns x features; a choice holds up to them."
            console.print(f"{sizes} A call that takes long is measured on fewer groups or rows.", soft_wrap=True)
        console.print(f"File of this machine: {of_device['file']}", soft_wrap=True)
        checks = of_device["checks"]
        passed = sum(outcome == machine.PASSED for outcome in checks.values())
        if checks:
            console.print(f"{passed} of {len(checks)} checks of kernels on {device} passed.")
        elif any(rule.processor == of_device["hardware"] for rule in rules.AUTO):
            console.print(f"No kernel is checked on {device}: the committed rows are of this hardware.")
        else:
            console.print(f"No kernel has been checked on {device} yet: --check does so.")
        for family, outcome in checks.items():
            if outcome != machine.PASSED:
                console.print(f"{family}: {outcome}", style="red", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
