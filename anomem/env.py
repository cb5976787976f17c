"""`python -m anomem.env`: what this machine can run, and what to do about what it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import torch

import anomem
from anomem import backends

_LIBRARIES = ("torch", "torchvision", "triton", "numpy", "scikit-learn", "scikit-image", "matplotlib", "tensorboard")


def versions() -> list[tuple[str, str]]:
    """Name and version of everything that matters to a result, "not installed" where it is missing."""
    rows = [("anomem", anomem.__version__), ("python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", torch.version.cuda or "none"))
    rows.append(("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"))
    rows.append(("tiles of the Triton kernels", backends.source_of_tiles()))
    rows.append(("torch threads", str(torch.get_num_threads())))
    rows.append(("CPU capability", torch.backends.cpu.get_cpu_capability()))
    for tool, purpose in (("c++", "builds the CPU kernels"), ("nvcc", "builds the CUDA kernels")):
        rows.append((tool, shutil.which(tool) or f"not found; it {purpose}"))
    return rows


def main() -> int:
    """Print versions, which implementation runs which operator and why not, and the table behind impl="auto"."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = Table("what", "version or place", title="This machine")
    for row in versions():
        about.add_row(*row)
    console.print(about)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        runs = Table("operator", "implementation", "runs here?", title=f"float32 tensors on {device}")
        for operator, implementation, answer in backends.table(device):
            runs.add_row(operator, implementation, answer, style=None if answer.startswith("runs") else "dim")
        console.print(runs)
    auto = Table("operator", "device", "takes", "where", "reason", title='impl="auto": the first line that applies')
    for rule in backends.AUTO:
        auto.add_row(rule.operator, rule.device, rule.implementation, str(rule.where), rule.reason)
    auto.add_row("any", "any", "reference", "otherwise", "no kernel that runs here was measured to be faster")
    console.print(auto)
    return 0


if __name__ == "__main__":
    sys.exit(main())
