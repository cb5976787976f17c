"""The comparisons of this folder with the kernels of older processors; everywhere else the newest set runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OPERATORS = ("inference", "info_nce", "nt_xent", "retrieve", "sampling", "shrink")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_comparisons_pass_with(isa: str) -> None:
    """The set is chosen once per process, hence another one."""
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "budget or spoils or beta or steps"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"{HERE}/test_{operator}.py" for operator in OPERATORS)],
        env={**os.environ, "ANOMEM_CPU": isa},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if "this processor cannot run it" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
