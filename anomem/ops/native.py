"""Loads the C++ library, once, when the first native operator is called.

`ANOMEM_LIBRARY` names a folder to load it from instead of the package's, for example a sanitized build.
"""

from __future__ import annotations

import functools
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from anomem.ops import (
    library,  # the schemas must be registered before their implementations
    sources,
)

# Bytes of scratch memory, the most at once since the last call. For benchmarks: torch does not see that memory.
library.define("native_scratch_peak", "(Tensor like) -> int", lambda like: 0)

_PACKAGE = Path(__file__).resolve().parent.parent
_FATBIN = (0xBA55ED50).to_bytes(4, "little")
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
        return _load("_C_cuda.so", "run `make build` where nvcc and a CUDA build of torch are") or _image_obstacle()
    return f"the native library has no kernels for {device} tensors"


def _image_obstacle() -> str | None:
    """Why the CUDA module has no machine code for the current GPU, or None."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    images = images_in(path_of("_C_cuda.so"))
    if any(image.runs_on(capability) for image in images):
        return None
    built = ", ".join(sorted(f"{'sm' if image.binary else 'PTX'}_{image.architecture}" for image in images))
    name = "{}.{}".format(*capability)
    return f"the CUDA module has code for {built}, none for this GPU's compute capability {name}; rebuild it there"


class Image(NamedTuple):
    """One program in a CUDA library."""

    binary: bool
    """Machine code, or PTX that the driver compiles."""
    architecture: int
    """Such as 90 for capability 9.0."""

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Machine code runs on later minor versions of its architecture, PTX on every later one."""
        if self.binary:
            return self.architecture // 10 == capability[0] and self.architecture % 10 <= capability[1]
        return self.architecture <= 10 * capability[0] + capability[1]


def images_in(path: Path) -> set[Image]:
    """The programs in a CUDA library, read from the headers that nvcc writes before them."""
    content, found, at = path.read_bytes(), set(), 0
    while (at := content.find(_FATBIN, at)) >= 0:
        header, size = struct.unpack_from("<HQ", content, at + 6)
        at += header
        end = at + size
        while at < end:
            kind, header, size = struct.unpack_from("<HxxIQ", content, at)
            found.add(Image(kind == 2, *struct.unpack_from("<I", content, at + 28)))
            at += header + size
    return found


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
