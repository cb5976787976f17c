"""Every CPU source that includes torch's headers compiles with those of the oldest supported torch.

The other tests run a library that was built with the newest torch. CUDA sources include the same headers.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
TARGET: str = runpy.run_path(str(ROOT / "setup.py"))["TORCH_TARGET"]
OLDEST = f"{int(TARGET[2:4], 16)}.{int(TARGET[4:6], 16)}"
SOURCES = sorted(path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if "<torch/" in path.read_text())


def test_the_library_is_built_for_the_oldest_torch_that_installs() -> None:
    assert f'"torch>={OLDEST}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not torch.__version__.startswith(f"{OLDEST}."), reason=f"needs torch {OLDEST}")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles(source: Path) -> None:
    folders = [f"-I{ROOT / 'csrc'}", *(f"-isystem{folder}" for folder in include_paths())]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", f"-DTORCH_TARGET_VERSION={TARGET}", *folders, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
