"""What a row says about where it was measured: code, libraries and device, and nothing that names a host."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> str:
    """Output of a git command in the project, "" where there is no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Instruction set that torch uses and the processor's family, e.g. "x86_64 AVX512, family 25 model 17"."""
    described = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return described
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "cpu family" in values and "model" in values:
        described += f", family {values['cpu family']} model {values['model']}"
    return described


class Others:
    """Measures, as a context, how many cores other processes keep busy: `cores` afterwards, None where Linux is not."""

    cores: float | None = None

    def __enter__(self) -> Others:
        self._before = self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._seconds()
        if self._before is not None and after is not None:
            wall, busy, own = (end - start for end, start in zip(after, self._before, strict=True))
            self.cores = max(0.0, round((busy - own) / wall, 2)) if wall else 0.0

    def _seconds(self) -> tuple[float, float, float] | None:
        """Wall time, time that all cores were busy, time that this process used."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft, *_ = (int(field) for field in fields[1:])
        busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()


@functools.cache
def about(device: str) -> dict[str, Any]:
    """The fields that every row of a run shares.

    Args:
        device: "cpu" or "cuda".
    """
    import anomem

    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or os.environ.get("ANOMEM_COMMIT"),
        # Rows and pictures are results: writing them does not make the code that was measured another one.
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")),
        "anomem": anomem.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
    }
