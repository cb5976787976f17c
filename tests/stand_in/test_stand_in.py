"""Runs the cases of this folder and the GPU tests on stand-in GPUs; see `__main__.py`.

Kernels compute nothing there. Their results are tested by the interpreter (tests/kernels) and the emulation
(tests/cuda).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stand_in.build import build, obstacle

ROOT = Path(__file__).resolve().parents[2]
OBSTACLE = obstacle()

pytestmark = [
    pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE)),
    pytest.mark.xdist_group("stand_in"),  # one build, one cache of compiled kernels
    pytest.mark.timeout(600),
]


def run(*arguments: str, **variables: str) -> None:
    """pytest in a process whose GPUs are the stand-ins, with further environment variables."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "tests.stand_in.must_be_there", *arguments]
    # A worker's own settings must not reach the inner run.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**outer, **build(), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=590,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


@pytest.mark.parametrize("cases", ["refusal", "launch", "pass", "range", "training", "counting"])
def test_cases(cases: str) -> None:
    run(f"tests/stand_in/{cases}_cases.py")


@pytest.mark.parametrize("capability", ["75", "86", "120"])
def test_other_gpus(capability: str) -> None:
    run("tests/stand_in/capability_cases.py", ANOMEM_STAND_IN_CAPABILITY=capability)


@pytest.mark.parametrize("folder", ["tests/kernels", "tests/cuda"])
def test_gpu_tests_reach_their_kernels(folder: str) -> None:
    """The GPU tests without comparing values: the stand-in refuses none of their calls."""
    library = {**os.environ, **build()}.get("ANOMEM_LIBRARY", "")
    if folder == "tests/cuda" and not Path(library, "_C_cuda.so").exists():
        pytest.skip("the CUDA module was not built here")
    # launch_cases.py launches the kernels of float16.
    run("-m", "gpu", "-k", "not float16", "-p", "tests.stand_in.without_values", folder)
