"""What runs on a GPU's host side, without a GPU: on two stand-ins, which record what they are given to do.

They take the place of CUDA's runtime, driver and matrix products in a process of its own (LD_PRELOAD). There torch has
CUDA tensors, streams, graphs and an allocator, and Triton compiles and launches, but no kernel computes anything: what
the kernels compute is held by the interpreter (tests/kernels) and the emulation (tests/cuda).
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import anomem

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror"]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the stand-in"),
    pytest.mark.skipif(not (torch.version.cuda or "").startswith("13."), reason="speaks for CUDA 13, needs its torch"),
    pytest.mark.xdist_group("stand_in"),  # one build, one cache of compiled kernels
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of libcuda.so.1, the stand-in for the driver, the runtime and cuBLAS."""
    headers = next(filter(complete, header_folders()), None)
    if headers is None:
        pytest.skip("needs the headers of CUDA 13, which come with nvcc or with Triton")
    folder = tmp_path_factory.mktemp("stand_in")
    command = ["g++", *FLAGS, "-shared", "-Wl,-soname,libcuda.so.1", f"-isystem{headers}"]
    command += [*map(str, sorted(HERE.glob("*.cpp"))), "-ldl", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return folder


def header_folders() -> Iterator[Path]:
    """Where CUDA's headers may be."""
    if shutil.which("nvcc"):
        yield runpy.run_path(str(ROOT / "setup.py"))["cuda_home"]() / "include"
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        yield Path(triton.origin).parent / "backends" / "nvidia" / "include"


def complete(headers: Path) -> bool:
    """Whether they are those of CUDA 13, and all of them."""
    runtime = headers / "cuda_runtime_api.h"
    found = runtime.exists() and (headers / "crt" / "host_defines.h").exists()
    return found and re.search(r"define CUDART_VERSION +13", runtime.read_text()) is not None


@pytest.fixture(scope="module")
def library(stand_in: Path) -> Path | None:
    """The native library with its CUDA module linked to no runtime, or None where that module was not built."""
    if not (Path(anomem.__file__).parent / "_C_cuda.so").exists():
        return None
    environment = {**os.environ, "ANOMEM_BUILD": "cuda", "ANOMEM_CUDART": "none"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(stand_in / "library")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return stand_in / "library" / "anomem"


def run(stand_in: Path, library: Path | None, *arguments: str) -> None:
    """pytest in a process whose GPUs are the stand-ins."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    # A worker's own settings must not reach the inner run, nor may the interpreter.
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    inner = {
        "LD_PRELOAD": str(stand_in / "libcuda.so.1"),
        "TRITON_LIBCUDA_PATH": str(stand_in),
        "TRITON_INTERPRET": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(stand_in / "inductor"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if library is not None:
        inner["ANOMEM_LIBRARY"] = str(library)
    result = subprocess.run(command, cwd=ROOT, env={**outer, **inner}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


@pytest.mark.parametrize("cases", ["refusal", "launch", "range", "training"])
def test_cases(stand_in: Path, library: Path | None, cases: str) -> None:
    run(stand_in, library, f"tests/stand_in/{cases}_cases.py")


@pytest.mark.parametrize("folder", ["tests/kernels", "tests/cuda"])
def test_gpu_tests_reach_their_kernels(stand_in: Path, library: Path | None, folder: str) -> None:
    """The tests for a GPU, as far as they can be judged without one: nothing that they call is refused."""
    if library is None and folder == "tests/cuda":
        pytest.skip("the CUDA module was not built here")
    run(stand_in, library, "-m", "gpu", "-p", "tests.stand_in.without_values", folder)
