"""Sweeps: cells run once, killed ones go on, rows survive a crash, and mistakes are one sentence."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anomem.cli import main
from anomem.errors import UserError
from anomem.reproduce import EXPERIMENTS, Scale, Sweep, read_rows, run
from anomem.reproduce import sweep as sweep_module
from anomem.reproduce.cell import run_cell
from anomem.reproduce.sweep import append_row, cut_torn_row
from anomem.reproduce.tables import markdown
from anomem.train import checkpoint
from anomem.train.stopping import Interrupted

TINY = Scale(epochs=2, subset=24)


def silent(line: str) -> None:
    """Say nothing."""


@pytest.fixture
def tiny(tmp_path: Path) -> Sweep:
    """Two cells of a second."""
    settings = ("linear", "exponential")
    folder = tmp_path / "sweep"
    return Sweep(
        "table7", "digits", folder, classes=("3",), settings=settings, seeds=(0,), scale=TINY, jobs=1, device="cpu"
    )


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in one order, without what differs from run to run."""
    kept = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
    return sorted(kept, key=lambda row: row["setting"])


def test_a_finished_cell_never_runs_again_and_processes_change_nothing(
    tiny: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = run(tiny, silent)
    assert [row["setting"] for row in rows] == ["linear", "exponential"]
    assert not list((tiny.output / "cells").iterdir()), "checkpoints of finished cells are removed"
    parallel = run(replace(tiny, output=tmp_path / "parallel", jobs=2), silent)
    assert {row["threads"] for row in parallel} == {sweep_module.threads_of(2)}
    same = [{**row, "threads": 0} for row in without_times(rows)]
    assert same == [{**row, "threads": 0} for row in without_times(parallel)]

    def refuse(*_: object) -> dict[str, Any]:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(sweep_module, "run_cell", refuse)
    said: list[str] = []
    assert run(tiny, said.append) == rows
    assert said == ["[2/2] cells are finished already"]
    with pytest.raises(AssertionError, match="run again"):
        run(replace(tiny, seeds=(0, 1)), silent)


def test_a_killed_cell_goes_on_from_its_checkpoint(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = tiny.cells[0]
    setting = EXPERIMENTS["table7"].settings[cell.setting]
    whole = run_cell(cell, setting, tiny.output / "whole", "cpu")
    step_done = checkpoint.StageState.step_done

    def stopped(self: checkpoint.StageState, done: int, *rest: Any) -> None:
        if done == 1:
            rest[2].signal = signal.SIGTERM
        step_done(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.StageState, "step_done", stopped)
        with pytest.raises(Interrupted):
            run_cell(cell, setting, tiny.output / "killed", "cpu")
    started: list[int] = []
    restore = checkpoint.StageState.restore

    def noted(self: checkpoint.StageState) -> int:
        started.append(restore(self))
        return started[-1]

    monkeypatch.setattr(checkpoint.StageState, "restore", noted)
    again = run_cell(cell, setting, tiny.output / "killed", "cpu")
    assert started == [1]
    assert without_times([again]) == without_times([whole])


def test_a_failed_cell_ends_the_others(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(cell: Any, *_: object) -> dict[str, Any]:
        if cell.setting == "exponential":
            raise UserError("no more room")
        time.sleep(60)
        return {}

    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(sweep_module, "run_cell", failing)
    monkeypatch.setattr(sweep_module, "estimate", lambda *_: "soon")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)
    began = time.monotonic()
    with pytest.raises(UserError, match="exponential, 3, seed 0: no more room"):
        run(replace(tiny, jobs=2), silent)
    assert time.monotonic() - began < 30


def test_workers_end_when_the_sweep_is_killed() -> None:
    reading, writing = os.pipe()  # its end is seen when the last process that holds `writing` is gone
    forking = multiprocessing.get_context("fork")

    def work() -> None:
        sweep_module._begin_worker(1)
        os.write(writing, b"begun")
        time.sleep(60)

    def killed() -> None:
        worker = forking.Process(target=work)
        worker.start()
        worker.join()

    sweep = forking.Process(target=killed)
    sweep.start()
    os.close(writing)
    try:
        assert os.read(reading, 5) == b"begun"
        assert sweep.pid is not None
        os.kill(sweep.pid, signal.SIGKILL)
        assert select.select([reading], [], [], 20)[0], "the worker goes on"
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)
        sweep.join()


def test_an_interrupted_sweep_says_how_to_go_on(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> dict[str, Any]:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(sweep_module, "run_cell", interrupted)
    with pytest.raises(Interrupted, match="0 of 2 cells are finished and kept; the same command goes on"):
        run(tiny, silent)


def test_a_torn_row_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"setting": "a", "normal": "3", "seed": 0, "metrics": {}}
    append_row(file, row)
    file.write_bytes(file.read_bytes() + b'{"setting": "b", "nor')
    assert read_rows(file) == [row]
    cut_torn_row(file)
    append_row(file, {**row, "setting": "c"})
    assert [r["setting"] for r in read_rows(file)] == ["a", "c"]
    file.write_bytes(b"{}\n" + file.read_bytes())
    with pytest.raises(UserError, match="line 1 is damaged; remove it to run its cell again"):
        read_rows(file)


@pytest.fixture
def begun(tiny: Sweep, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """A sweep whose cells cost nothing; a call begins it and gives a changed one."""

    def row(cell: Any, *_: object) -> dict[str, Any]:
        named = {"setting": cell.setting, "normal": cell.normal, "seed": cell.seed, "class": cell.normal}
        cost = {"seconds": 0.0, "cpu_seconds": 0.0, "threads": 1, "train_images": 24}
        return {**named, **cost, "metrics": {"plain": {"auroc": 0.5}}}

    monkeypatch.setattr(sweep_module, "run_cell", row)
    monkeypatch.setattr(sweep_module, "estimate", lambda *_: "soon")

    def begin(**changes: Any) -> Sweep:
        run(tiny, silent)
        return replace(tiny, **changes)

    return begin


def test_a_folder_of_another_command_or_commit_is_refused(
    begun: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = begun(experiment="table6", settings=())
    with pytest.raises(UserError, match=r'holds another sweep .*its experiment is "table7", here "table6"'):
        run(other, silent)
    with pytest.raises(UserError, match=r'its scale is .*"subset": 24.*choose another --output'):
        run(begun(scale=Scale(subset=25)), silent)
    same = begun()
    monkeypatch.setattr(sweep_module, "commit", lambda: "0123456789ab")
    with pytest.raises(UserError, match=r"was begun with the code \w+.*, this is 0123456789ab, and rows of two states"):
        run(same, silent)


def test_further_seeds_are_another_command_of_the_same_sweep(begun: Callable[..., Sweep]) -> None:
    more = begun(seeds=(0, 1), command="anomem more")
    for _ in range(2):
        run(more, silent)
    header = json.loads((more.output / "sweep.json").read_text())
    assert (header["command"], header["continued"]) == ("", ["anomem more"])
    assert "`anomem more`" in markdown(more.output)


def test_a_step_is_timed_for_each_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"efficientnet_b0": 1.0, "resnet18": 2.0, "resnet50": 10.0}
    monkeypatch.setattr(sweep_module, "seconds_per_step", lambda config, *_: (seconds[config.model.backbone], 0.0))
    sweep = Sweep("backbones", "digits", tmp_path, classes=("3",), seeds=(0, 1), scale=Scale(steps=6), jobs=1)
    said = sweep_module.estimate(sweep, sweep.cells)
    assert "stage 1 of ResNet-50: 6 steps of 128 images, about 60 s a class" in said
    assert "stage 1 takes 3 min in all" in said  # 2 seeds × 6 steps × 13 s


def test_a_class_of_cifar_has_one_name(tmp_path: Path) -> None:
    sweep = Sweep("table7", "cifar10", tmp_path, classes=("truck", "0"), settings=("linear",), seeds=(0,))
    assert [cell.normal for cell in sweep.cells] == ["9", "0"]
    with pytest.raises(UserError, match="`classes`: expected each once, received 0 0"):
        replace(sweep, classes=("airplane", "0"))


def test_a_folder_of_other_files_is_refused(tiny: Sweep) -> None:
    tiny.output.mkdir()
    (tiny.output / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files; choose a new or empty folder"):
        run(tiny, silent)
    assert (tiny.output / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds"], "`seeds`: expected at least one seed, received none"),
        (["--seeds", "-1"], "`seeds`: expected an integer ≥ 0"),
        (["--classes", "13"], "`classes`: expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, received '13'"),
        (["--settings", "cubic"], "`settings`: expected one of 'linear', 'exponential', 'untrained', received 'cubic'"),
        (["--epochs", "0"], "`epochs`: expected an integer ≥ 1, received 0"),
        (["--epochs", "1", "--steps", "1"], "`steps`: expected epochs or steps, received both"),
        (["--seeds", "0", "0"], "`seeds`: expected each once, received 0 0"),
        (["--classes", "3", "3"], "`classes`: expected each once, received 3 3"),
        (["--subset", "1"], "`subset`: expected an integer ≥ 2, received 1"),
        (["--jobs", "0"], "`jobs`: expected an integer ≥ 1, received 0"),
        (["--table-only"], "holds no finished cell"),
        (
            ["--data", "cifar10", "--data.root", "nowhere"],
            "nowhere/cifar-10-batches-py/data_batch_1, which is not there",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "table7", "--output", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("anomem: ")
    assert said.count("\n") == 1


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    small = ["--classes", "3", "--seeds", "0", "--epochs", "2", "--subset", "24", "--jobs", "1", "--device", "cpu"]
    arguments = ["reproduce", "figure5", *small, "--output", str(folder)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "[2/2] untrained" in out
    assert "about" in out.splitlines()[1], "the time is estimated before the first cell"
    table = (folder / "table.md").read_text()
    header = json.loads((folder / "sweep.json").read_text())
    assert header["command"] == f"anomem {' '.join(arguments)}"
    assert f"`{header['command']}`" in table
    assert f"Commit {header['commit']}" in table
    assert {p.name for p in (folder / "pictures").iterdir()} == {
        "summary.png", "trained-3-seed0.png", "untrained-3-seed0.png",
    }  # fmt: skip
    (folder / "table.md").unlink()
    assert main(["reproduce", "figure5", "--output", str(folder), "--table-only", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{folder / 'table.md'}\n"
    assert (folder / "table.md").read_text() == table
    assert main(["reproduce", "table6", "--output", str(folder), "--table-only", "--quiet"]) == 2
    assert 'its experiment is "figure5", here "table6"' in capsys.readouterr().err
