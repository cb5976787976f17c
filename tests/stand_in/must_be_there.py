"""pytest plugin: without the stand-in GPUs nothing below it may run, or be skipped, and pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from anomem.ops import native
from stand_in import recording


def pytest_configure(config: pytest.Config) -> None:
    if not (recording.present() and torch.cuda.is_available()):
        raise pytest.UsageError("the stand-in GPUs are not there")
    if Path(os.environ.get("ANOMEM_LIBRARY", ""), "_C_cuda.so").exists() and native.obstacle("cuda"):
        raise pytest.UsageError(f"the native library cannot run on them: {native.obstacle('cuda')}")
