"""The command line in this process, and one finished run to use it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from anomem.cli import main


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def anomem(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of a digits run of a second."""
    values = {
        "data.normal": 3,
        "optimizer.steps": 4,
        "optimizer.batch-size": 32,
        "optimizer.warmup": 1,
        "loss.max-positions": 2,
        "score.copies": 0,
        "run.device": "cpu",
        "run.log-every": 2,
    }
    return [*(f"--{name}={value}" for name, value in values.items()), "--model.prototypes", "8"]


@pytest.fixture(scope="session")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that damage it work on a copy."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *tiny, "--run.directory", str(path), "--quiet"]) == 0
    return path
