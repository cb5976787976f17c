"""Compiling the stand-in, and the environment of a process that runs on it."""

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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDER = ROOT / "build" / "stand_in"
LIBRARY = FOLDER / "libcuda.so.1"  # the driver's name, by which Triton and torch look for it
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-shared", f"-Wl,-soname,{LIBRARY.name}"]


def obstacle() -> str | None:
    """Why there can be no stand-in here, or None."""
    import torch

    if shutil.which("g++") is None:
        return "the stand-in needs g++"
    if not (torch.version.cuda or "").startswith("13."):
        return f"the stand-in speaks for CUDA 13, and this torch is built for {torch.version.cuda or 'no CUDA'}"
    if _headers() is None:
        return "the stand-in needs the headers of CUDA 13, which come with nvcc or with Triton"
    return None


def build() -> dict[str, str]:
    """Compile what is older than its sources.

    Returns:
        The environment variables of a process whose GPUs are the stand-ins. If the package's CUDA module was built,
        it is there too, linked to no runtime of its own; where `ANOMEM_LIBRARY` is set, that one must be so already.

    Raises:
        RuntimeError: there can be no stand-in here.
    """
    reason = obstacle()
    if reason is not None:
        raise RuntimeError(reason)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if _older(LIBRARY, HERE.glob("*.[ch]*")):
        command = ["g++", *FLAGS, f"-isystem{_headers()}", *map(str, sorted(HERE.glob("*.cpp"))), "-ldl"]
        subprocess.run([*command, "-o", str(LIBRARY)], check=True)
    environment = {
        "LD_PRELOAD": str(LIBRARY),
        "TRITON_LIBCUDA_PATH": str(FOLDER),
        "TRITON_INTERPRET": "0",
        # Launchers are linked to the driver that is there, so these are not for anybody else.
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
    }
    native = None if "ANOMEM_LIBRARY" in os.environ else _native_library()
    return environment if native is None else {**environment, "ANOMEM_LIBRARY": str(native)}


def _native_library() -> Path | None:
    built = ROOT / "anomem" / "_C_cuda.so"
    if not built.exists():
        return None
    folder = FOLDER / "library"
    if _older(folder / "anomem" / built.name, [built]):
        environment = {**os.environ, "ANOMEM_BUILD": "cuda", "ANOMEM_CUDART": "none"}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder / "anomem"


def _older(product: Path, sources: Iterator[Path] | list[Path]) -> bool:
    return not product.exists() or any(source.stat().st_mtime > product.stat().st_mtime for source in sources)


def _headers() -> Path | None:
    return next(filter(_complete, _header_folders()), None)


def _header_folders() -> Iterator[Path]:
    if shutil.which("nvcc"):
        yield runpy.run_path(str(ROOT / "setup.py"))["cuda_home"]() / "include"
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        yield Path(triton.origin).parent / "backends" / "nvidia" / "include"


def _complete(headers: Path) -> bool:
    """Whether they are those of CUDA 13, and all of them."""
    runtime = headers / "cuda_runtime_api.h"
    found = runtime.exists() and (headers / "crt" / "host_defines.h").exists()
    return found and re.search(r"define CUDART_VERSION +13", runtime.read_text()) is not None
