"""A run that is stopped and resumed ends bit for bit where an unbroken one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anomem import choice
from anomem.errors import UserError
from anomem.train import RunDirectory, TrainConfig, load_scorer, resume, train
from anomem.train.checkpoint import load_checkpoint
from anomem.train.config import to_dict

ROOT = Path(__file__).resolve().parents[2]
# Trains until the checkpoint named on the command line has been written, then dies without any clean-up.
KILLED = """
import os, sys
from pathlib import Path
import torch
from anomem.train import TrainConfig, checkpoint, train
from anomem.train.config import load_config

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
save = checkpoint.save_checkpoint

def save_and_die(directory, name, step, *rest):
    save(directory, name, step, *rest)
    if f"{name}-{step}" == sys.argv[2]:
        os._exit(9)

checkpoint.save_checkpoint = save_and_die
train(load_config(TrainConfig, Path(sys.argv[1])), quiet=True)
"""


def tensors_of(run: Path, name: str) -> dict[str, torch.Tensor]:
    found = load_checkpoint(RunDirectory(run).checkpoints, name)
    assert found is not None
    return found.tensors


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("stage1", "stage2", "scorer"):
        expected, actual = tensors_of(first, name), tensors_of(second, name)
        assert expected.keys() == actual.keys()
        for key in expected:
            assert torch.equal(expected[key], actual[key]), f"{name}: {key}"
    timing = ("seconds", "images_per_second")
    timeless = [
        [{k: v for k, v in row.items() if k not in timing} for row in RunDirectory(run).rows()]
        for run in (first, second)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("moment", ["stage1-4", "stage2-2"])
def test_killed_and_resumed_is_bit_for_bit_unbroken(
    tiny: TrainConfig, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[dict[str, Any]] = []
    monkeypatch.setattr(choice, "follow", followed.append)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tiny = replace(tiny, run=replace(tiny.run, checkpoint_every=2, threads=1))
        whole = train(tiny, quiet=True)
        broken = replace(tiny, run=replace(tiny.run, directory=str(tmp_path / "broken")))
        file = tmp_path / "broken.json"
        file.write_text(json.dumps(to_dict(broken)))
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(file), moment],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 9
        with pytest.raises(UserError, match="not finished"):
            load_scorer(tmp_path / "broken")
        assert_same_run(whole, resume(tmp_path / "broken", quiet=True))
        assert {before["device"] for before in followed} == {"cpu"}
    finally:
        torch.set_num_threads(threads)


def test_a_finished_run_is_left_as_it_is(tiny: TrainConfig) -> None:
    run = train(tiny, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    resume(run, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_a_directory_that_holds_a_run_is_refused(tiny: TrainConfig) -> None:
    RunDirectory.create(tiny)
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny, quiet=True)


def test_a_wrong_setting_leaves_no_directory_behind(tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match="scales"):
        train(replace(tiny, model=replace(tiny.model, scales=("layer7",))), quiet=True)
    assert not Path(str(tiny.run.directory)).exists()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run: expected the file .*config\.json"):
        resume(tmp_path)
