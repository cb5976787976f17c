"""benchmarks/gpu.sh with a Python that records what it is asked to run: the programs exist and read their options."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
printf '%s\\t' "$@" >>"$CALLS"; printf '\\n' >>"$CALLS"
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *find_spec*"'$MISSING'"*) exit 1 ;;
esac
exit 0
"""
SANITIZER = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do [ "$1" = --error-exitcode ] || [ "$1" = --tool ] && shift; shift; done
exec "$@"
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with a Python and a compute-sanitizer."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(machine: Path, missing: str = "nothing") -> tuple[int, str, list[list[str]]]:
    """Exit status, summary, and the arguments of each call of Python."""
    calls = machine / "calls"
    environment = {
        **os.environ,
        "PATH": f"{machine}:{os.environ['PATH']}",
        "PYTHON": str(machine / "python"),
        "CALLS": str(calls),
        "MISSING": missing,
    }
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", machine / "out"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert not done.stderr, done.stderr
    summary = (machine / "out" / "summary.txt").read_text()
    return done.returncode, summary, [line.split("\t")[:-1] for line in calls.read_text().splitlines()]


def test_every_step_runs_a_program_with_options_that_it_has(machine: Path) -> None:
    status, summary, calls = run(machine)
    assert status == 0
    assert "FAILED" not in summary
    programs = [call[1:] for call in calls if call[0] == "-m" and call[1].startswith("benchmarks.")]
    # First what is right, then five cases, then the suites.
    touched = [call for call in calls if call[:2] == ["-m", "benchmarks.touch"]]
    assert [call[-1] for call in touched] == ["native", "native", "triton", "triton"][-len(touched) :]
    expected = [*["run"] * 5, "run", "run", "tune", "profile_training", "run", "run"]
    assert [name for name, *_ in programs if name != "benchmarks.touch"] == [f"benchmarks.{name}" for name in expected]
    suite = importlib.import_module("benchmarks.suites").suite("kernels", "cuda")
    for line in (line for name, *line in programs if "--filter" in line):
        wanted = line[line.index("--filter") + 1]
        assert [case for case in suite.cases if wanted in case.title], wanted
    for name, *line in programs:
        options = importlib.import_module(name).Options
        assert dataclasses.is_dataclass(tyro.cli(options, args=line))
    (tests,) = (call for call in calls if call[:2] == ["-m", "pytest"])
    files = [word for word in tests if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).exists() for file in files)


def test_only_races_in_kernels_of_this_library_are_failures(machine: Path) -> None:
    line = "========= Error: Race reported between Write access at {} and Read access"
    for kernel, failed in (
        ("cutlass_80_tensorop", 0),
        ("void anomem::entry<Softmax>", 1),
        ("retrieve_resident_kernel", 1),
    ):
        (machine / "python").write_text(
            PYTHON.replace(
                "exit 0\n",
                f"""
case "$*" in *benchmarks.touch*triton*) echo '{line.format(kernel)}' ;; esac
exit 0
""",
            )
        )
        status, summary, _ = run(machine)
        assert status == failed, summary
        assert ("races in kernels of this library" in summary) == bool(failed)


def test_without_what_the_suites_need_it_says_so(machine: Path) -> None:
    status, summary, calls = run(machine, missing="tyro")
    assert status == 0
    assert "tyro is not installed" in summary
    assert not [call for call in calls if call[:2] == ["-m", "benchmarks.run"]]
    assert [call for call in calls if call[:2] == ["-m", "pytest"]]
