"""Builds `anomem/_C.so` (CPU) and `anomem/_C_cuda.so` (CUDA) on the LibTorch stable ABI; metadata is in pyproject.toml.

`ANOMEM_BUILD` chooses what is built:

- `auto` (default): both, as far as torch, a C++ compiler and nvcc are found; a module that cannot be built is skipped
  with a message.
- `cpu`, `cuda`: the CPU module, or both; anything missing is an error.
- `none`: no native code. The package then runs on its reference and, on GPUs, on Triton.

`ANOMEM_CUDART=none` links the CUDA module without CUDA's runtime, for a process that brings its own: tests/stand_in/.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = runpy.run_path(str(ROOT / "anomem" / "ops" / "sources.py"))
# The oldest torch that the library runs on: it is built against the stable ABI of this release.
TORCH_TARGET = "0x020b000000000000"


class CannotBuild(Exception):
    """Why a module cannot be built on this machine."""


class AnyPythonWheel(bdist_wheel):
    """A wheel for one platform and any Python 3: the libraries call torch's C functions and none of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def extensions() -> tuple[list[Extension], Any]:
    """The modules to build and the command that builds them."""
    wanted = os.environ.get("ANOMEM_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"ANOMEM_BUILD: expected auto, cpu, cuda or none, received {wanted!r}")
    if wanted == "none":
        return [], build_ext
    modules = []
    for make, needed in ((cpu_module, True), (cuda_module, wanted == "cuda")):
        if wanted == "cpu" and make is cuda_module:
            continue
        try:
            modules.append(make())
        except CannotBuild as reason:
            if wanted != "auto" and needed:
                sys.exit(f"ANOMEM_BUILD={wanted}: {reason}")
            print(f"anomem: {reason}", file=sys.stderr)
    if not modules:
        return [], build_ext
    from torch.utils.cpp_extension import BuildExtension

    return modules, BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=shutil.which("ninja") is not None)


def cpu_module() -> Extension:
    """`anomem._C`: operator implementations for CPU tensors; links torch_cpu only."""
    include, libraries = torch_paths()
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise CannotBuild(f"no C++ compiler ({compiler}) found, so the CPU kernels are left out")
    sanitize = os.environ.get("ANOMEM_SANITIZE")
    # Python's own flags include -fwrapv, which would hide signed overflow from the sanitizer.
    debug = ["-g1", "-O1", "-fno-wrapv", "-fno-omit-frame-pointer"]
    # Python's own flags include -g; without -g0 nine tenths of the library would be debug information.
    flags = [*debug, f"-fsanitize={sanitize}"] if sanitize else ["-O3", "-g0"]
    return Extension(
        "anomem._C",
        sources=[*sources("csrc/cpu/*.cpp"), mark("_C")],
        include_dirs=[str(ROOT / "csrc"), *include],
        library_dirs=libraries,
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        # No -ffast-math: NaN and inf must agree with the reference.
        extra_compile_args={"cxx": ["-std=c++17", "-fvisibility=hidden", "-Wall", "-fno-math-errno", *flags]},
        extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [],
    )


def cuda_module() -> Extension:
    """`anomem._C_cuda`: operator implementations for CUDA tensors; links torch_cuda and CUDA's static runtime."""
    include, libraries = torch_paths()
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        raise CannotBuild("this torch has no CUDA, so the CUDA kernels are left out")
    home = cuda_home()
    cpp_extension.CUDA_HOME = str(home)
    banner = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", banner)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        found = f"CUDA {release.group(1)}" if release else "an unreadable version"
        raise CannotBuild(
            f"nvcc is of {found} and torch of CUDA {torch.version.cuda}, so the CUDA kernels are left out"
        )
    # Without this default torch looks for a GPU at build time. The PTX serves architectures after sm_90.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    runtime = [] if os.environ.get("ANOMEM_CUDART") == "none" else ["cudart_static", "rt", "dl", "pthread"]
    return Extension(
        "anomem._C_cuda",
        sources=[*sources("csrc/cuda/*.cu"), mark("_C_cuda")],
        include_dirs=[str(ROOT / "csrc"), *include, str(home / "include")],
        library_dirs=[*libraries, str(home / "lib64")],
        libraries=["torch_cpu", "torch_cuda", *runtime],
        language="c++",  # of the link: setuptools does not know .cu and would not link libstdc++
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": ["-std=c++17", "-O3", "-fvisibility=hidden"],
            "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden"],
        },
    )


def cuda_home() -> Path:
    """Root of the CUDA toolkit, as nvcc itself reports it: the nvcc on PATH or in CUDA_HOME may be a wrapper."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{named}/bin" if named else None)
    if nvcc is None:
        raise CannotBuild("nvcc was not found (CUDA_HOME or PATH), so the CUDA kernels are left out")
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def torch_paths() -> tuple[list[str], list[str]]:
    """Include and library directories of the installed torch."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuild(
            f"torch cannot be imported here ({error}), so no native code is built: install torch first and then "
            "anomem with --no-build-isolation"
        ) from error
    return cpp_extension.include_paths(), cpp_extension.library_paths()


def mark(module: str) -> str:
    """A source file with a digest of all other sources; lets the loader reject a library built from older sources."""
    text = SOURCES["MARK"].decode() + SOURCES["digest"](f"{module}.so", ROOT)
    path = ROOT / "build" / "sources" / f"sources{module}.cpp"
    content = f'extern "C" __attribute__((used)) const char anomem_sources[] = "{text}";\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != content:
        path.write_text(content)
    return str(path.relative_to(ROOT))


def sources(*patterns: str) -> list[str]:
    """Source files, relative to the project as setuptools wants them."""
    found = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    if not found:
        raise CannotBuild(f"no source matches {', '.join(patterns)}")
    return found


if __name__ == "__main__":
    ext_modules, command = extensions()
    packages = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in sorted((ROOT / "anomem").rglob("__init__.py"))
        if "kernels" not in path.parts
    ]
    setup(
        packages=[*packages, "anomem.kernels"],
        package_dir={"anomem": "anomem", "anomem.kernels": "kernels"},
        package_data={"anomem": ["py.typed", "gains.json"], "anomem.report": ["*.jinja", "*.css", "*.js"]},
        ext_modules=ext_modules,
        cmdclass={"build_ext": command, "bdist_wheel": AnyPythonWheel},
    )
