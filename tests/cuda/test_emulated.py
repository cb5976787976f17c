"""The CUDA kernels on the CPU: g++ compiles csrc/cuda against tests/cuda/emulation, and cases.py runs on the result.

What stands on trial is the product's own source, the operators with their chunks and launch sizes included; only the
launch, the matrix product and CUDA's headers are replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# The kernels read 16 bytes through uint4, as CUDA code does.
FLAGS = ["-std=c++17", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
TORCH_TARGET = "0x020b000000000000"  # as setup.py

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU")


def compile_emulated(build: Path, flags: list[str]) -> Path:
    """The CUDA operators as a library for CPU tensors."""
    include = [f"-I{HERE / 'emulation'}", f"-I{ROOT / 'csrc'}"]
    include += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(build / f"{source.stem}.o")
        command = ["g++", *FLAGS, *flags, "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        command += [*include, "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    library = build / "emulated.so"
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu"]
    subprocess.run(["g++", "-shared", *flags, "-o", str(library), *map(str, objects), *link], check=True)
    return library


def run_cases(library: Path, *options: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(HERE / "emulated_cases.py"), *options]
    # A worker's own settings must not reach the inner run.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    inherited |= {"ANOMEM_EMULATED_LIBRARY": str(library), **environment}
    result = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def runtime(name: str) -> str:
    """Where g++ keeps a sanitizer's runtime library."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_kernels(tmp_path: Path) -> None:
    run_cases(compile_emulated(tmp_path, ["-O1"]))


def test_kernels_under_the_sanitizers(tmp_path: Path) -> None:
    library = compile_emulated(tmp_path, SANITIZE)
    run_cases(
        library,
        "-knot float16",  # whose addresses are those of bfloat16
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python and torch keep memory until the end.
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("planted") / "planted"
    include = [f"-I{HERE / 'emulation'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *FLAGS, *SANITIZE, *include, str(HERE / "planted.cpp"), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize(
    ("bug", "caught_as"),
    [
        ("missing-barrier", "wrong result"),
        ("divergent-barrier", "divergent barrier"),
        ("out-of-bounds", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_planted_bugs_are_caught(planted: Path, bug: str, caught_as: str) -> None:
    assert subprocess.run([planted, "sound"], timeout=60).returncode == 0
    result = subprocess.run([planted, bug], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert caught_as in result.stderr
