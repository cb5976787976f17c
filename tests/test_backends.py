"""Which implementation runs a call, and the words in which that is explained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anomem import backends
from anomem.backends import Problem, Rule
from anomem.errors import ArgumentError

ROOT = Path(__file__).resolve().parent.parent


def problem(operator: str = "nt_xent", dtype: torch.dtype = torch.float32, rows: int = 8) -> Problem:
    return Problem(operator, "cpu", dtype, 16, rows=rows, columns=8)


def test_the_reference_runs_everything() -> None:
    for operator in backends.OPERATORS:
        assert backends.choose(problem(operator), "reference") == "reference"


def test_auto_takes_the_first_rule_that_applies_and_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (
        Rule("nt_xent", "cuda", "triton", "always", "another device", lambda p: True),
        Rule("nt_xent", "cpu", "native", "rows ≥ 100", "measured", lambda p: p.rows >= 100),
    )
    monkeypatch.setattr(backends, "AUTO", rules)
    monkeypatch.setattr(backends, "obstacle", lambda *args: None)
    assert backends.explain(problem(rows=100)) == ("native", "rows ≥ 100: measured")
    assert backends.explain(problem(rows=99))[0] == "reference"


def test_auto_passes_over_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "AUTO", (Rule("nt_xent", "cpu", "native", "always", "fast", lambda p: True),))
    monkeypatch.setattr(backends, "obstacle", lambda *args: "not built")
    assert backends.explain(problem()) == ("reference", "native cannot run here: not built")
    with pytest.raises(ArgumentError, match="not built"):
        backends.choose(problem(), "native")


def test_every_rule_names_an_operator_an_implementation_and_its_reason() -> None:
    for rule in backends.AUTO:
        assert rule.operator in backends.OPERATORS
        assert rule.implementation in backends.IMPLEMENTATIONS[1:]
        assert rule.device in ("cpu", "cuda")
        assert rule.where
        assert rule.reason


def test_a_part_without_a_kernel_chooses_for_itself() -> None:
    assert backends.for_part("variance", "cpu", "triton") == "auto"
    assert backends.for_part("nt_xent", "cpu", "triton") == "triton"
    assert backends.for_part("nt_xent", "cpu", "native") == "native"


def test_obstacles_are_sentences() -> None:
    for operator, implementation, answer in backends.table("cpu"):
        assert answer == "runs" or len(answer.split()) > 3, (operator, implementation, answer)


def test_the_environment_can_be_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "anomem.env"], cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("torch", "nt_xent", "triton", "native", "reference", "tiles of the Triton kernels"):
        assert word in done.stdout


def test_the_source_of_tiles_is_told_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.source_of_tiles() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("ANOMEM_AUTOTUNE", "ANOMEM_TILES"):
        monkeypatch.delenv(name, raising=False)
    assert "the package's table" in backends.source_of_tiles()
    monkeypatch.setattr(backends, "_triton_obstacle", lambda *args: "not installed")
    assert backends.source_of_tiles() == "not installed"
