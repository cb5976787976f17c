"""Every test chooses on a processor without committed rows, as a user with an empty cache folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anomem import backends, measuring, rules
from anomem.machine import Measured
from anomem.ops import native
from anomem.rules import Problem


@pytest.fixture(autouse=True)
def measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user's process with a cache folder of its own, on a processor without committed rows."""
    if (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)  # `make test` builds it first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ANOMEM_CHOICE")
    monkeypatch.setattr(rules, "AUTO", ())
    monkeypatch.setattr(rules, "RULES", ())
    torch.use_deterministic_algorithms(False)
    backends.forget()
    yield
    monkeypatch.undo()
    backends.forget()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel passes its check."""
    monkeypatch.setattr(measuring, "check", lambda *_: "passed")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, checked: None) -> list[Problem]:
    """Measurements find the kernel twice as fast; gives the calls that were measured."""
    calls: list[Problem] = []

    def measure(problem: Problem, training: bool, kernels: list[str], rivals: bool = False) -> Measured:
        calls.append(problem)
        return Measured("native", {"reference": 2.0, "native": 1.0})

    monkeypatch.setattr(measuring, "measure", measure)
    return calls
