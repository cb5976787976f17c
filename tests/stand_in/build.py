"""Compiles the stand-in and gives the environment of a process that runs on it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

DEVICE = Path(__file__).resolve().parent / "device"
ROOT = DEVICE.parents[2]
FOLDER = ROOT / "build" / "stand_in"
LIBRARY = FOLDER / "libcuda.so.1"  # the driver's name: Triton and torch look for it
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-shared", f"-Wl,-soname,{LIBRARY.name}"]


def obstacle() -> str | None:
    """Why the stand-in cannot be built on this machine, or None."""
    import torch

    if shutil.which("g++") is None:
        return "the stand-in needs g++"
    if not (torch.version.cuda or "").startswith("13."):
        return f"the stand-in replaces CUDA 13; this torch was built for {torch.version.cuda or 'no CUDA'}"
    if _headers() is None:
        return "the stand-in needs the headers of CUDA 13, which come with nvcc or with Triton"
    if ":" in str(FOLDER):
        return f"LD_LIBRARY_PATH takes no folder with a colon in its name: {FOLDER}"
    return None


def build() -> dict[str, str]:
    """Compile the libraries that are older than their sources.

    Returns:
        The environment variables of a process whose GPUs are the stand-ins. If the package's CUDA module was built, it
        is built again without a CUDA runtime; a library named by `ANOMEM_LIBRARY` must have been built so.

    Raises:
        RuntimeError: the stand-in cannot be built on this machine, or a compiler fails.
    """
    reason = obstacle()
    if reason is not None:
        raise RuntimeError(reason)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if _older(LIBRARY, DEVICE.iterdir()):
        # Atomic: another process may be about to load it.
        fresh = LIBRARY.with_suffix(f".{os.getpid()}")
        command = ["g++", *FLAGS, f"-isystem{_headers()}", *map(str, sorted(DEVICE.glob("*.cpp"))), "-ldl"]
        _run([*command, "-o", str(fresh)])
        fresh.replace(LIBRARY)
    environment = {
        # Name and folder apart: the loader splits LD_PRELOAD at spaces.
        "LD_PRELOAD": " ".join(filter(None, [LIBRARY.name, os.environ.get("LD_PRELOAD")])),
        "LD_LIBRARY_PATH": ":".join(filter(None, [str(FOLDER), os.environ.get("LD_LIBRARY_PATH")])),
        "TRITON_LIBCUDA_PATH": str(FOLDER),
        "TRITON_INTERPRET": "0",
        # Caches of its own: compiled launchers are linked to the stand-in's driver.
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
        variables = {"ANOMEM_BUILD": "cuda", "ANOMEM_CUDART": "none"}
        _run([sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)], **variables)
    return folder / "anomem"


def _run(command: list[str], **variables: str) -> None:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} fails:\n{(done.stdout + done.stderr)[-2000:]}")


def _older(product: Path, sources: Iterable[Path]) -> bool:
    return not product.exists() or any(source.stat().st_mtime > product.stat().st_mtime for source in sources)


def _headers() -> Path | None:
    return next(filter(_complete, _header_folders()), None)


def _header_folders() -> Iterator[Path]:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        yield Path(triton.origin).parent / "backends" / "nvidia" / "include"
    setup = runpy.run_path(str(ROOT / "setup.py"))
    with contextlib.suppress(setup["CannotBuild"]):
        yield setup["cuda_home"]() / "include"


def _complete(headers: Path) -> bool:
    """Whether a folder holds all the headers of CUDA 13."""
    runtime = headers / "cuda_runtime_api.h"
    complete = runtime.exists() and (headers / "crt" / "host_defines.h").exists()
    return complete and re.search(r"define CUDART_VERSION +13", runtime.read_text()) is not None
