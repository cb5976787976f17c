"""NT-Xent across processes, in two real ones that talk by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anomem import functional as AF
from anomem import nn as ann
from anomem.errors import ArgumentError
from anomem.testing import draw

ROOT = Path(__file__).resolve().parents[2]


def in_two_processes(tmp_path: Path, *checks: str) -> None:
    script = Path(__file__).with_name("one_of_two_processes.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", str(script), str(rank), str(tmp_path / "store"), *checks],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    assert all("all right" in text for text in printed)


def test_two_processes_are_one(tmp_path: Path) -> None:
    in_two_processes(
        tmp_path,
        "rows_are_those_of_one_process",
        "gradients_under_ddp_are_those_of_one_process",
        "gathering_is_twice_differentiable",
    )


def test_two_processes_are_two_of_lightly(tmp_path: Path) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    in_two_processes(tmp_path, "rows_agree_with_lightly")


def test_without_processes_it_is_the_plain_loss() -> None:
    z, z_pair = draw(5, 8), draw(5, 8, seed=1)
    assert AF.gather_rows(z) is z
    assert torch.equal(AF.nt_xent_distributed(z, z_pair), AF.nt_xent(z, z_pair))
    assert torch.equal(ann.NTXentLoss(gather_distributed=True)(z, z_pair), ann.NTXentLoss()(z, z_pair))


def test_what_has_no_rows_is_told() -> None:
    with pytest.raises(ArgumentError, match=r"`rows`: expected a tensor \[\.\.\., B, d\]"):
        AF.gather_rows(torch.zeros(3))
