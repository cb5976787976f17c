"""Training by several processes: the weights are those of one, checkpoints go on with another number, none hangs."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from anomem.cli import main
from anomem.data import ResidentImages, load_task
from anomem.errors import ArgumentError, UserError
from anomem.models import ModelConfig, build_model
from anomem.models.encoders import ResidualBlock
from anomem.train import OptimizerConfig, TrainConfig, load_scorer, model_for, resume, train
from anomem.train.batches import training_batches
from anomem.train.checkpoint import load_checkpoint
from anomem.train.config import to_dict
from anomem.train.cores import own_cores
from anomem.train.ranks import ADDRESS, WAIT, Ranks, _connect, joined
from anomem.train.rows import Rows, blocks, seed_of, shares
from anomem.train.rundir import RunDirectory
from anomem.train.steps import Shares
from tests.processes import in_processes
from tests.train import jobs

CASES: list[dict[str, Any]] = [
    {},
    {"parallel": "fsdp", "accumulate": 2, "ema": 0.5},
    {"ring": True, "micro_batch": 2},
]


def test_many_processes_train_the_weights_of_one(tmp_path: Path) -> None:
    count = 3
    for number, case in enumerate(CASES):
        torch.save(jobs.trained(jobs.config_of(**case)), tmp_path / f"case{number}.pt")
    in_processes(count, jobs.same_weights, str(tmp_path), CASES)
    # One process reads what they have written.
    for number, case in enumerate(CASES):
        path = tmp_path / f"run{number}-{count}"
        found = load_checkpoint(path / "checkpoints", "stage1")
        assert found is not None
        assert found.step == 3
        rows = [(row["stage"], row["step"]) for row in RunDirectory(path).rows()]
        assert rows == [(stage, step) for stage in ("stage1", "stage2") for step in (1, 2, 3)]
        jobs.assert_same_weights(
            jobs.trained(jobs.config_of(**case), RunDirectory(path)),
            torch.load(tmp_path / f"case{number}.pt", weights_only=True),
            "read by one process",
        )


def test_a_stopped_run_goes_on_with_another_number_of_processes(tiny: TrainConfig, tmp_path: Path) -> None:
    run_config = replace(tiny.run, precision="float32", memory_format="contiguous", parallel="fsdp")
    float32 = replace(tiny, optimizer=replace(tiny.optimizer, ema=0.5), run=run_config)
    whole = train(replace(float32, run=replace(float32.run, directory=str(tmp_path / "whole"))), quiet=True)
    in_processes(3, jobs.a_run, to_dict(float32), 2, False)  # a signal to the last process alone
    run = Path(str(tiny.run.directory))
    with pytest.raises(UserError, match="not finished"):
        load_scorer(run)
    in_processes(2, jobs.a_run, to_dict(float32), None, True)
    start = model_for(float32, load_task(float32.data)).state_dict()
    expected, found = (load_scorer(path).model.state_dict() for path in (whole, run))
    moved, apart = (
        torch.cat(
            [(expected[name] - other[name]).flatten() for name in start if start[name].is_floating_point()]
        ).norm()
        for other in (start, found)
    )
    assert apart < 1e-3 * moved  # the same trajectory, to rounding
    assert resume(run, quiet=True) == run  # finished


def test_mistakes_are_said_once_and_none_hangs(tiny: TrainConfig) -> None:
    in_processes(3, jobs.mistakes, to_dict(tiny), 2)


def test_what_every_process_finds_is_said_once(tiny: TrainConfig, tmp_path: Path) -> None:
    diverges = replace(tiny.optimizer, learning_rate=100.0, weight_decay=100.0, warmup=0)
    in_processes(2, jobs.the_same_failure, to_dict(replace(tiny, optimizer=diverges)), str(tmp_path))
    (said,) = tmp_path.glob("said*")
    assert "the loss is not finite" in said.read_text()


@pytest.mark.parametrize("batch_norm", ["job", "process"])
def test_the_messages_of_a_step_are_those_of_the_documentation(tmp_path: Path, batch_norm: str) -> None:
    in_processes(2, jobs.messages_of_a_step, str(tmp_path), batch_norm)
    sent, other = (json.loads((tmp_path / f"sent{rank}").read_text()) for rank in (0, 1))
    assert sent == other
    model = build_model(ModelConfig(), (32, 32), 3, (0.5,) * 3, (0.25,) * 3)
    parts = list(model.encoder.modules())
    norms = sum(isinstance(part, _BatchNorm) for part in parts) - sum(isinstance(part, ResidualBlock) for part in parts)
    # Batch norm in each pass, two of a block in one; shared groups, and what comes back; gradients of the encoder and
    # of the rest; whether a process has been asked to stop.
    of_norms = 2 * norms if batch_norm == "job" else 0
    assert sum(sent.values()) == of_norms + 2 + 2 + 1
    documentation = " ".join((Path(__file__).parents[2] / "docs" / "PERFORMANCE.md").read_text("utf-8").split())
    if of_norms:
        assert f"a step of the small encoder sends {sum(sent.values())} messages, {of_norms} of them" in documentation
    else:
        assert f"`--run.batch-norm process` leaves {sum(sent.values())} messages" in documentation


def test_batch_norm_of_each_process(tmp_path: Path) -> None:
    in_processes(2, jobs.batch_norm_of_each_process, str(tmp_path))
    one, other = (torch.load(tmp_path / f"whole{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)
    config = jobs.config_of(batch_size=12)
    joint = jobs.trained(replace(config, synthetic_outliers=0.0))
    stem = next(name.removesuffix("running_mean") for name in one if name.endswith("running_mean"))
    # The mean of equal shares' means is the mean of all, but for the first steps' different weights; variances differ.
    torch.testing.assert_close(one[stem + "running_mean"], joint[stem + "running_mean"], rtol=0.05, atol=1e-3)
    assert not torch.allclose(one[stem + "running_var"], joint[stem + "running_var"], rtol=1e-4)


def test_an_encoder_of_ones_own(tmp_path: Path) -> None:
    torch.save(jobs.trained(jobs.config_of(), network=jobs.Peculiar), tmp_path / "peculiar.pt")
    in_processes(3, jobs.an_encoder_of_ones_own, str(tmp_path))


def test_a_process_that_dies_ends_the_job(tiny: TrainConfig) -> None:
    in_processes(3, jobs.a_process_dies, to_dict(tiny))


def test_processes_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29400")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but RANK and MASTER_ADDR are not set"), joined("cpu"):
        pass


@pytest.mark.parametrize(("name", "value", "wanted"), [
    ("WORLD_SIZE", "two", "an integer ≥ 1, received 'two'"),
    ("RANK", "2", "an integer from 0 to 1, received '2'"),
    ("RANK", "first", "an integer from 0 to 1, received 'first'"),
    ("MASTER_PORT", "70000", "an integer from 0 to 65535, received '70000'"),
])  # fmt: skip
def test_an_environment_that_is_not_torchruns(
    name: str, value: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400", name: value}
    for variable, text in given.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(UserError, match=f"{name}: expected {wanted}"), joined("cpu", timedelta(seconds=1)):
        pass


def test_an_empty_world_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    with joined("cpu") as ranks:
        assert ranks.count == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
@pytest.mark.parametrize(("local", "index", "cores", "bound"), [
    ("2", "1", {3, 5, 6, 8}, {6, 8}),
    ("2", "0", {3, 5, 6, 8}, {3, 5}),
    ("2", "0", {0, 1, 2, 3, 4}, None),  # a core is free
    ("4", "0", {0, 1, 2, 3}, None),  # more threads than cores
    (None, "0", {0, 1}, None),  # not of torchrun
])  # fmt: skip
def test_processes_that_use_all_cores_are_bound_to_their_own(
    monkeypatch: pytest.MonkeyPatch, local: str | None, index: str, cores: set[int], bound: set[int] | None
) -> None:
    given: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted: given.append(set(wanted)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("LOCAL_RANK", index)
    with own_cores():
        within = list(given)
    assert within == [bound] * len(within)
    assert bool(within) == (bound is not None)
    assert given == within + [cores] * (len(given) - len(within))
    assert bool(given) == bool(within)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone has that policy")
def test_threads_that_carry_messages_give_way_to_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, started = threading.Event(), []

    def connect(*given: Any, **options: Any) -> None:
        started.append(threading.Thread(target=ended.wait, daemon=True))
        started[0].start()

    monkeypatch.setattr(dist, "init_process_group", connect)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ADDRESS:
        monkeypatch.setenv(name, "0")
    _connect("2", "cpu", WAIT)
    try:
        assert os.sched_getscheduler(started[0].native_id) == os.SCHED_BATCH
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
    finally:
        ended.set()


def test_one_process_needs_no_others() -> None:
    ranks = Ranks.current()
    values = torch.randn(3)
    assert (ranks.index, ranks.count, ranks.first) == (0, 1, True)
    assert ranks.mean(values) is values
    assert ranks.largest(3, 0) == [3, 0]
    ranks.require_same({"a": 1})
    assert ranks.on_first(lambda: 5) == 5


def test_shares_are_contiguous_and_complete() -> None:
    rows = Rows.of(11, 0.4)
    assert (len(rows), rows.synthetic) == (15, 4)
    for parts in (1, 2, 3, 4):
        found = rows.split(parts)
        assert [i for part in found for i in part.images] == list(range(11))
        assert [j for part in found for j in part.outliers] == list(range(4))
        assert [len(part.images) for part in found] == [len(part) for part in shares(11, parts)]
    second = rows.split(2)[1]
    assert second.pieces == (range(5, 11), range(13, 15))
    assert sorted(second.sources()) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]  # those of all outliers, one block
    assert blocks(range(60, 130)) == [(0, range(60, 64)), (1, range(64)), (2, range(2))]
    assert len({seed_of(purpose, 0, step) for purpose in range(4) for step in range(100)}) == 400


@pytest.mark.parametrize(("batch", "ratio", "micro"), [(70, 2.0, 9), (130, 0.9, 20), (11, 0.4, None)])
def test_every_row_gets_its_image(batch: int, ratio: float, micro: int | None) -> None:
    pixels = torch.arange(batch + 5).to(torch.uint8).view(-1, 1, 1, 1)
    images = ResidentImages(pixels)
    order = next(training_batches(images, batch, 0, 0, 1)).indices
    config = OptimizerConfig(batch_size=batch, accumulate=2, micro_batch=micro)
    seen = []
    for rank in range(3):
        chunks = Shares(len(images), config, ratio, Ranks(rank, 3))
        given = next(training_batches(images, batch, 0, 0, 1, chunks.places))
        for rows in (rows for part in chunks.parts for rows in part):
            expected = order[rows.images.start : rows.images.stop]
            assert torch.equal(given.indices_at(rows.images), expected)
            assert torch.equal(given.at(rows.images).flatten(), expected.to(torch.uint8))
            for block in rows.outlier_blocks():
                sources = torch.cat(given.runs([j % batch for j in block])).flatten()
                assert torch.equal(sources, order[[j % batch for j in block]].to(torch.uint8))
            seen += [*rows.pieces[0], *rows.pieces[1]]
    assert sorted(seen) == list(range(batch + round(ratio * batch)))


def test_a_micro_batch_is_compared_with_the_images_there_are() -> None:
    """A set of fewer images than the batch is one batch."""
    with pytest.raises(ArgumentError, match=r"`optimizer.micro_batch`: expected at most 8, the images of a batch"):
        Shares(8, OptimizerConfig(batch_size=16, micro_batch=9), 0.0, Ranks())


def test_no_run_begins_whose_batches_cannot_be_made(tiny: TrainConfig) -> None:
    for wrong in ({"micro_batch": 5000}, {"accumulate": 4000}):
        config = replace(tiny, optimizer=replace(tiny.optimizer, batch_size=8192, **wrong))
        with pytest.raises(ArgumentError, match=f"`optimizer.{next(iter(wrong))}`"):
            train(config, quiet=True)
        assert not Path(str(config.run.directory)).exists()


def test_a_fit_is_of_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", "."]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
