"""The comparisons of tests/operators with the kernels of other processors; everywhere else the newest set runs.

That one is asked for by name here too, for retrieval.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_the_comparisons_pass_with(isa: str) -> None:
    """The set is chosen once per process, hence another one."""
    newest = isa == "avx512_bf16"
    tests = "native and test_within_budget" if newest else "native and (budget or spoils or beta or steps)"
    folder = ROOT / "tests/operators"
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", tests, f"--ignore-glob={folder}/*_accuracy.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder / "test_retrieve.py" if newest else folder)],
        env={**os.environ, "ANOMEM_CPU": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "this processor cannot run it" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
