"""Compiled kernels executed on the CPU: right numbers, and nothing that PTX leaves undefined.

`make test` runs one launch of each kernel and scheme; `make test-ptx` every shipped kernel with products.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.xdist_group("ptx")  # one cache of compiled kernels


def run(*arguments: str) -> str:
    """`python -m tests.ptx`, in a process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "ptx"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=590,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_each_kernel_once(architecture: int) -> None:
    if architecture == 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        pytest.skip("this Triton is refused on sm_100")
    run("--subset", str(architecture))


@pytest.mark.timeout(600)
def test_planted_mistakes_are_caught() -> None:
    """A deleted barrier, wait or fence and a mask set to true each show as a fault or a wrong number."""
    output = run("--mutations")
    assert "0 missed" in output
