"""pytest plugin: fail at once, instead of skipping, when the stand-in GPUs are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from anomem.ops import native
from tests.stand_in import recording


def pytest_configure(config: pytest.Config) -> None:
    if not (recording.present() and torch.cuda.is_available()):
        raise pytest.UsageError("the stand-in GPUs are missing")
    built = Path(os.environ.get("ANOMEM_LIBRARY", ""), "_C_cuda.so").exists()
    if built and "ANOMEM_STAND_IN_CAPABILITY" not in os.environ and native.obstacle("cuda"):
        raise pytest.UsageError(f"the native library cannot run on them: {native.obstacle('cuda')}")
