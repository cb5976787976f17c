"""Loads the C++ library, once, when the first native operator is called.

`ANOMEM_LIBRARY` names a folder to load it from instead of the package's, for example a sanitized build.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

from anomem.ops import (
    library,  # noqa: F401  the schemas must be registered before their implementations
    sources,
)

_PACKAGE = Path(__file__).resolve().parent.parent
_HOW = "run `make build` (needs a C++ compiler and ninja)"


@functools.cache
def obstacle(device: str) -> str | None:
    """Why the native kernels cannot run on this kind of device, or None; loads the library to find out.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cpu":
        return _load("_C.so", _HOW)
    if device == "cuda":
        if torch.version.cuda is None:
            return "this torch has no CUDA"
        return _load("_C_cuda.so", "run `make build` where nvcc and a CUDA build of torch are")
    return f"the native library has no kernels for {device} tensors"


def path_of(file: str) -> Path:
    """Where a library, "_C.so" or "_C_cuda.so", is looked for."""
    folder = os.environ.get("ANOMEM_LIBRARY")
    return (Path(folder).resolve() if folder else _PACKAGE) / file


@functools.cache
def _load(file: str, how: str) -> str | None:
    folder, path = os.environ.get("ANOMEM_LIBRARY"), path_of(file)
    if not path.exists():
        return f"ANOMEM_LIBRARY={folder}: no {file} in it" if folder else f"anomem/{file} is not built; {how}"
    expected = sources.digest(file, _PACKAGE.parent)
    if expected is not None and sources.built_from(path) != expected:
        reason = f"{path.parent.name}/{file} was built from other sources than those in csrc: {how}"
        # Under impl="auto" nothing else would report why calls are slow.
        warnings.warn(f"anomem: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    try:
        # Registering the same operators twice aborts the process. The cache prevents a second load.
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.parent.name}/{file} does not load with torch {torch.__version__}: {error}"
    return None
