"""Trainings that are stopped or disturbed: signals, two at once, killed writers, damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anomem.errors import UserError
from anomem.train import RunConfig, RunDirectory, TrainConfig, load_scorer, resume, stage1, stage2, train
from anomem.train.checkpoint import load_checkpoint, saved_step
from anomem.train.config import to_dict
from anomem.train.run import _finished
from anomem.train.stopping import Interrupted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def interrupts_as_in_a_terminal() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, and a training leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def at_step(monkeypatch: pytest.MonkeyPatch, stage: Any, step: int, action: Callable[[], object]) -> None:
    """Do something in the middle of a step (from 1) of a stage."""
    set_rates = stage.set_rates

    def and_act(optimizer: Any, average: Any, settings: Any, number: int) -> None:
        if number + 1 == step:
            action()
        set_rates(optimizer, average, settings, number)

    monkeypatch.setattr(stage, "set_rates", and_act)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def same(first: Path, second: Path) -> bool:
    tensors = [load_checkpoint(run / "checkpoints", "scorer") for run in (first, second)]
    assert tensors[0] is not None
    assert tensors[1] is not None
    return all(torch.equal(value, tensors[1].tensors[name]) for name, value in tensors[0].tensors.items())


@pytest.mark.parametrize(
    ("number", "stage", "step"),
    [(signal.SIGTERM, stage1, 3), (signal.SIGINT, stage2, 2), (signal.SIGHUP, stage1, 6)],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", value)),
)
def test_a_signal_ends_the_step_and_the_run_goes_on_bit_for_bit(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, stage: Any, step: int
) -> None:
    whole = train(replace(tiny, run=replace(tiny.run, directory=str(tmp_path / "whole"))), quiet=True)
    before: dict[int, Any] = {}
    for other in (signal.SIGTERM, signal.SIGHUP):  # one that is not handled would end the tests
        before[other] = signal.signal(other, lambda *_: None)
    with monkeypatch.context() as patch:
        at_step(patch, stage, step, send(number))
        with pytest.raises(Interrupted) as caught:
            train(tiny, quiet=True)
    name = stage.__name__.rsplit(".", 1)[1]
    run = Path(str(tiny.run.directory))
    assert saved_step(run / "checkpoints", name) == step
    assert caught.value.signal == number
    assert str(caught.value) == (
        f"stopped; {name} is saved up to step {step}; continue with `anomem train --resume {run}`"
    )
    assert not (run / ".lock").exists()
    assert same(whole, resume(run, quiet=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for other, handler in before.items():
        signal.signal(other, handler)


def test_a_second_signal_stops_at_once(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, stage1, 2, twice)
    with pytest.raises(KeyboardInterrupt, match="no checkpoint yet"):
        train(tiny, quiet=True)


def test_a_terminated_command_says_how_to_continue(tiny: TrainConfig, tmp_path: Path) -> None:
    settings = replace(tiny.run, log_every=1, compile=False)  # a long run would be compiled first
    slow = replace(tiny, optimizer=replace(tiny.optimizer, steps=100_000), run=settings)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(slow)))
    process = subprocess.Popen(
        [sys.executable, "-m", "anomem", "train", "--config", str(file)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = RunDirectory(Path(str(tiny.run.directory)))
    until = time.monotonic() + 120
    while not run.log_file.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    sentence = err.splitlines()[-1]
    assert sentence.startswith("anomem: stopped; stage1 is saved up to step ")
    assert sentence.endswith(f"continue with `anomem train --resume {run.path}`")


def test_minutes_are_lost_and_not_the_run(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < RunConfig().checkpoint_minutes <= 10
    often = replace(tiny, run=replace(tiny.run, checkpoint_minutes=1e-9))

    def die() -> None:
        raise ZeroDivisionError

    at_step(monkeypatch, stage1, 4, die)
    with pytest.raises(ZeroDivisionError):
        train(often, quiet=True)
    assert saved_step(Path(str(tiny.run.directory)) / "checkpoints", "stage1") == 3


ANOTHER_PROCESS = """
import sys
from pathlib import Path
from anomem.errors import UserError
from anomem.train import resume, train
from anomem.train.config import TrainConfig, load_config
path = Path(sys.argv[1])
config = load_config(TrainConfig, path / "config.json")
for attempt in (lambda: resume(path, quiet=True), lambda: train(config, quiet=True)):
    try:
        attempt()
    except UserError as error:
        print(error)
"""


def test_a_run_that_is_being_trained_is_left_alone(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals: list[str] = []

    def in_this_process_and_in_another() -> None:
        for attempt in (lambda: resume(Path(str(tiny.run.directory)), quiet=True), lambda: train(tiny, quiet=True)):
            with pytest.raises(UserError) as caught:
                attempt()
            refusals.append(str(caught.value))
        command = [sys.executable, "-c", ANOTHER_PROCESS, str(tiny.run.directory)]
        refusals.extend(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())

    at_step(monkeypatch, stage1, 2, in_this_process_and_in_another)
    run = train(tiny, quiet=True)
    sentence = f"{run} is being trained by another process; wait until it ends, or choose another --run.directory"
    assert refusals == [sentence] * 4
    assert [row["step"] for row in RunDirectory(run).rows()] == [2, 4, 6, 2, 4, 6]


def test_what_a_killed_writer_left_is_removed(tiny: TrainConfig) -> None:
    run = RunDirectory.create(tiny)
    run.checkpoints.mkdir()
    left = [folder / f".{name}.{'0f' * 16}" for folder, name in ((run.path, "log.jsonl"), (run.checkpoints, "x.json"))]
    for file in left:
        file.write_bytes(b"half of it")
    resume(run.path, quiet=True)
    assert not any(file.exists() for file in left)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first stage is complete, its second half done."""
    path = tmp_path_factory.mktemp("stopped")
    tiny = _tiny(path)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, stage2, 3, send(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(tiny, quiet=True)
    return Path(str(tiny.run.directory))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(_tiny(tmp_path_factory.mktemp("whole")), quiet=True)


def _tiny(path: Path) -> TrainConfig:
    """The fixture `tiny` in another folder; pytest has no way to call a fixture."""
    from anomem.augment import AugmentConfig
    from anomem.data import DataConfig
    from anomem.models import ModelConfig
    from anomem.scoring import ScoreConfig
    from anomem.train import LossConfig, OptimizerConfig, Stage2Config, Stage2OptimizerConfig

    short = {"steps": 6, "batch_size": 32, "warmup": 2}
    return TrainConfig(
        data=DataConfig(normal="3"),
        augment=AugmentConfig.for_dataset("digits"),
        model=ModelConfig(prototypes=(8,)),
        loss=LossConfig(max_positions=2),
        optimizer=OptimizerConfig(**short),
        stage2=Stage2Config(hidden=4, embedding=4, optimizer=Stage2OptimizerConfig(**short)),
        score=ScoreConfig(copies=1),
        run=RunConfig(directory=str(path / "run"), device="cpu", log_every=2),
        synthetic_outliers=0.25,
    )


DAMAGED = {
    "empty": b"",
    "cut off": b'{"format": 2, "step',
    "no text": b"\xff\xfe\x00\x01",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "not a number": b'{"format": NaN}',
    "no format": b"{}",
    "deep": b"[" * 100_000,
    "format only": b'{"format": 2}',
    "a long number": b'{"format": ' + b"1" * 5000 + b"}",
    "words": b'{"format": "2", "step": "many"}',
}


@pytest.mark.parametrize("file", ["checkpoints/stage1.json", "checkpoints/stage2.json", "given.json", "config.json"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_beside_the_tensors_is_named(stopped: Path, tmp_path: Path, file: str, damage: str) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / file).write_bytes(DAMAGED[damage])
    if (file, damage) == ("given.json", "a list"):
        return  # names that mean nothing
    with pytest.raises(UserError) as caught:
        resume(run, quiet=True)
    assert Path(file).name in str(caught.value)
    assert str(run) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_scorer_is_named(whole: Path, tmp_path: Path, damage: str) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints" / "scorer.json").write_bytes(DAMAGED[damage])
    for function in (load_scorer, resume):
        with pytest.raises(UserError, match=r"scorer\.json"):
            function(run)  # type: ignore[operator]


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": "../../elsewhere.safetensors"},
        {"tensors": "/etc/passwd"},
        {"tensors": "stage1-00000006.safetensors"},
        {"step": 5},
        {"sha256": "0" * 64},
        {"about": {"alignment": "pooled"}},
        {"about": None},
        {"extra": 1},
    ],
    ids=str,
)
def test_an_edited_scorer_is_refused(whole: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    file = run / "checkpoints" / "scorer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match="damaged"):
        load_scorer(run)


@pytest.mark.parametrize("row", [b"{", b"[]", b'{"step": 2}', b'{"stage": "stage9", "step": 2}', b"\xff", b"[" * 9999])
def test_a_damaged_row_of_the_log_is_named(stopped: Path, tmp_path: Path, row: bytes) -> None:
    run = RunDirectory(shutil.copytree(stopped, tmp_path / "run"))
    lines = run.log_file.read_bytes().splitlines()
    run.log_file.write_bytes(b"\n".join([*lines, row]))
    assert len(run.rows()) == len(lines)  # cut off by a crash
    run.log_file.write_bytes(b"\n".join([lines[0], row, *lines[1:]]))
    with pytest.raises(UserError, match=r"line 2 of .*log\.jsonl is damaged.*delete this line"):
        resume(run.path, quiet=True)


def test_every_flipped_bit_of_a_weight_is_seen(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (file,) = (run / "checkpoints").glob("scorer-*.safetensors")
    content = bytearray(file.read_bytes())
    for place in (-1, -len(content) // 3, -len(content) // 2):
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged .*digest"):
            load_scorer(run)
        content[place] ^= 1


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [("model", "normalize", "l2"), ("score", "pool", "max"), ("data", "normal", "8"), ("run", "seed", 1)],
)
def test_a_setting_edited_after_the_training_is_named(
    whole: Path, tmp_path: Path, section: str, setting: str, value: object
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config[section][setting] = value
    (run / "config.json").write_text(json.dumps(config))
    for function in (load_scorer, resume):
        with pytest.raises(UserError, match=rf"was trained with `{section}\.{setting}` = .*config\.json says"):
            function(run)  # type: ignore[operator]


def test_settings_of_execution_may_change(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["run"] |= {"threads": 1, "log_every": 7, "checkpoint_minutes": 0.0}
    config["score"]["batch_size"] = 3
    (run / "config.json").write_text(json.dumps(config))
    load_scorer(run)
    assert _finished(*RunDirectory.open(run))


def test_the_scorer_of_another_run_is_refused(whole: Path, tiny: TrainConfig, tmp_path: Path) -> None:
    """The other run has the same settings, and has begun from other weights."""
    other = train(replace(tiny, run=replace(tiny.run, seed=1)), quiet=True)
    config = json.loads((other / "config.json").read_text())
    run = shutil.copytree(whole, tmp_path / "copy")
    for name in ("scorer.json", "scorer-00000006.safetensors"):
        shutil.copy(other / "checkpoints" / name, run / "checkpoints")
    with pytest.raises(UserError, match="was trained with `"):
        load_scorer(run)
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="belongs to another run: it continued another stage1"):
        load_scorer(run)


def test_other_training_images_are_noticed(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.data import ResidentImages
    from anomem.train import run as module

    load = module.load_task

    def changed(config: Any, *rest: Any) -> Any:
        task = load(config, *rest)
        images = task.train.images
        return replace(task, train=ResidentImages(images[:-1]), train_is_normal=task.train_is_normal[:-1])

    monkeypatch.setattr(module, "load_task", changed)
    with pytest.raises(UserError, match=r"training images are not those the run began with \(128 then, 127 now\)"):
        resume(shutil.copytree(stopped, tmp_path / "run"), quiet=True)


def test_the_first_step_is_shown_at_once_with_the_expected_time(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    long = replace(tiny, run=replace(tiny.run, log_every=1000))
    at_step(monkeypatch, stage1, 2, lambda: seen.append(capsys.readouterr().out))
    run = train(long)
    (first,) = seen
    line = first.splitlines()[-1]
    assert line.startswith("stage1 1/6  loss ")
    assert line.endswith(" left")
    assert "  about " in line
    assert "detector: one Gaussian per position" in first
    assert [row["step"] for row in RunDirectory(run).rows()] == [6, 6]


def test_output_that_has_gone_does_not_end_a_training(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> int:
            if "stage1 " in text:
                raise OSError(5, "Input/output error")
            return len(text)

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stdout", Gone())
    assert _finished(*RunDirectory.open(train(tiny)))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["device", "host", "Python"],
)
@pytest.mark.parametrize(("stage", "setting"), [(stage1, "--optimizer.batch-size"), (stage2, "--stage2.optimizer.")])
def test_too_little_memory_names_the_setting_to_lower(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, stage: Any, setting: str
) -> None:
    def fail() -> None:
        raise error

    at_step(monkeypatch, stage, 1, fail)
    with pytest.raises(UserError, match=f"out of memory; lower {setting}"):
        train(tiny, quiet=True)


def test_tensorboard_is_looked_for_before_anything_is_written(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="TensorBoard logs need the package tensorboard"):
        train(replace(tiny, run=replace(tiny.run, tensorboard=True)), quiet=True)
    assert not Path(str(tiny.run.directory)).exists()


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.05])
def test_few_synthetic_outliers_are_at_least_one(tiny: TrainConfig, ratio: float) -> None:
    short = replace(tiny, optimizer=replace(tiny.optimizer, batch_size=8))
    train(replace(short, synthetic_outliers=ratio), quiet=True)
