"""What the commands say when something is wrong: exit code 2, one sentence, and nothing overwritten."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anomem import obstacles

Command = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def complains(done: Any, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that has all the words."""
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("anomem: ")
    for word in words:
        assert word in done.err, done.err


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that may be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data.dataset=mnist",), ("`data.dataset`", "'digits'", "'mnist'")),
        (("--data.normal=x",), ("`data.normal`", "one of 0, 1", "'x'")),
        (("--optimizer.batch-size=1",), ("`optimizer.batch_size`", "≥ 2", "1")),
        (("--stage2.optimizer.steps=0",), ("`stage2.optimizer.steps`", "0")),
        (("--stage2.margin=0.5",), ("`stage2.margin`", "≥ 1", "0.5")),
        (("--stage2.hidden=0",), ("`stage2.hidden`", "≥ 1", "0")),
        (("--optimizer.weight-decay=-1",), ("`optimizer.weight_decay`", "≥ 0", "-1")),
        (("--optimizer.clip=0",), ("`optimizer.clip`", "> 0", "0")),
        (("--run.threads=0",), ("`run.threads`", "≥ 1", "0")),
        (("--run.checkpoint-every=-1",), ("`run.checkpoint_every`", "≥ 0", "-1")),
        (("--data.image-size=0",), ("`data.image_size`", "≥ 1", "0")),
        (("--data.outlier-ratio=-1",), ("`data.outlier_ratio`", "≥ 0", "-1")),
        (("--augment.flip=2",), ("`augment.flip`", "from 0 to 1", "2")),
        (("--augment.zoom", "2", "1"), ("`augment.zoom`", "low ≤ high", "(2.0, 1.0)")),
        (("--loss.ratio=0",), ("`loss.ratio`", "(0, 1]", "0")),
        (("--score.top-fraction=0",), ("`score.top_fraction`", "(0, 1]", "0")),
        (("--synthetic-outliers=-1",), ("`synthetic_outliers`", "-1")),
        (("--model.scales", "layer9"), ("`model.scales`", "'block3'", "'layer9'")),
        (("--model.prototypes", "3", "4"), ("`model.prototypes`", "3")),
        (("--run.device=abacus",), ("`run.device`", "abacus")),
        (("--data.dataset=cifar10", "--data.root=nowhere"), ("nowhere",)),
        (("--data.dataset=folder", "--data.root=nowhere"), ("nowhere", "is not there")),
    ],
)
def test_settings_no_run_can_use(
    anomem: Command, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    complains(anomem("train", *options, "--run.directory", run, "--quiet"), *words)
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--model.backbone=vgg"), ("invalid choice", "vgg", "resnet18")),
        (("train", "--optimiser.steps=3"), ("--optimiser",)),
        (("train", "--optimizer.steps=many"), ("many", "--optimizer.steps")),
        (("trian",), ("trian", "train")),
        ((), ("train", "evaluate", "score", "plot")),
    ],
)
def test_wrong_options_are_named(anomem: Command, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = anomem(*arguments)
    assert done.code == 2
    for word in words:
        assert word in done.out + done.err


def test_a_directory_that_holds_a_run_is_left_alone(anomem: Command, copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    complains(anomem("train", "--run.directory", copy), "already holds a run", "--resume")
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"optimizer": {"lr": 1}}', ("`optimizer.lr`", "no such setting", "learning_rate")),
        ('{"model": {"backbone": "vgg"}}', ("`model.backbone`", "'vgg'", "'resnet18'")),
        ('{"data": {"image_size": 0}}', ("`data.image_size`", "≥ 1", "0")),
        ('{"data": {"anomalies": "dust"}}', ("`data.anomalies`", "'photographs'", "'dust'")),
        ('{"augment": {"flip": 2}}', ("`augment.flip`", "from 0 to 1", "2.0")),
        ("{", ("not JSON",)),
        (None, ("cannot read",)),
    ],
)
def test_configurations_that_are_none(
    anomem: Command, tmp_path: Path, text: str | None, words: tuple[str, ...]
) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    complains(anomem("train", "--config", file), str(file), *words)


def test_settings_from_two_places(anomem: Command, finished: Path) -> None:
    complains(anomem("train", "--preset=digits", "--config", finished / "config.json"), "`--preset`", "`--config`")
    complains(anomem("train", "--resume", finished, "--optimizer.steps=3"), "`--resume`")


@pytest.mark.parametrize("command", ["evaluate", "plot"])
def test_a_folder_without_a_run(anomem: Command, tmp_path: Path, command: str) -> None:
    complains(anomem(command, tmp_path), "holds no run", "config.json")


def test_a_truncated_checkpoint(anomem: Command, copy: Path) -> None:
    (file,) = (copy / "checkpoints").glob("scorer-*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    complains(anomem("evaluate", copy), file.name, "truncated or damaged", "delete")
    complains(anomem("train", "--resume", copy), file.name, "truncated or damaged")


def test_a_checkpoint_of_other_settings(anomem: Command, copy: Path) -> None:
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"prototypes": [\n      8\n    ]', '"prototypes": [9]'))
    complains(anomem("plot", copy), "was trained with `model.prototypes` = [8]", "says [9]")


def test_an_unfinished_run(anomem: Command, copy: Path) -> None:
    (copy / "checkpoints" / "scorer.json").unlink()
    complains(anomem("evaluate", copy), "not finished", f"--resume {copy}")


def test_files_that_cannot_be_scored(anomem: Command, finished: Path, tmp_path: Path) -> None:
    complains(anomem("score", tmp_path, "--run", finished), str(tmp_path), "found none")
    complains(anomem("score", tmp_path / "none.png", "--run", finished), "none.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    complains(anomem("score", tmp_path, "--run", finished), "broken.png")
    complains(anomem("score", "--run", finished), "`paths`")
    complains(anomem("score", tmp_path, "--run", finished, "--output", "scores.txt"), "`--output`", ".csv")


def test_a_score_the_run_does_not_have(anomem: Command, finished: Path, tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    complains(anomem("score", tmp_path, "--run", finished, "--by", "stage2"), "`--by`", "plain", "'stage2'")


@pytest.mark.parametrize("train", [0, 1])
def test_folders_with_too_few_images(anomem: Command, tmp_path: Path, train: int) -> None:
    for part, count in (("train/good", train), ("test/good", 2), ("test/cut", 2)):
        (tmp_path / part).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32)).save(tmp_path / part / f"{i}.png")
    done = anomem("train", "--data.dataset=folder", "--data.root", tmp_path, "--run.directory", tmp_path / "run")
    complains(done, "found none" if train == 0 else "at least two normal training images")
    assert not (tmp_path / "run").exists()


def test_only_normal_images_to_test_on(anomem: Command, tmp_path: Path) -> None:
    for part in ("train/good", "test/good"):
        (tmp_path / part).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32)).save(tmp_path / part / f"{i}.png")
    options = ("--model.backbone=small", "--data.image-size=16", "--optimizer.steps=2", "--optimizer.warmup=0")
    where = ("--data.root", tmp_path, "--run.directory", tmp_path / "run", "--run.device=cpu", "--score.copies=0")
    done = anomem("train", *options, *where)
    assert (done.code, "no anomalous test images" in done.err) == (0, True), done.err


def test_an_implementation_that_cannot_run_here(
    anomem: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstacles, "_triton_obstacle", lambda *_: "no compiler")
    done = anomem("train", "--model.impl=triton", "--run.directory", tmp_path / "run", "--quiet")
    complains(done, "`impl`", "reference", "'triton'", "no compiler")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full(anomem: Command, tmp_path: Path, tiny: list[str]) -> None:
    run = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # bytes; a checkpoint is larger
    try:
        done = anomem("train", *tiny, "--run.directory", run, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    complains(done, f"cannot write {run / 'checkpoints'}", "File too large")
    assert list((run / "checkpoints").iterdir()) == []
    assert anomem("train", "--resume", run, "--quiet").code == 0
    assert (run / "checkpoints" / "scorer.json").exists()


def test_a_reader_who_leaves(finished: Path, tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    command = [sys.executable, "-m", "anomem", "score", str(tmp_path), "--run", str(finished)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_processes_that_do_not_know_where_the_others_are(
    anomem: Command, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    complains(anomem("train", *tiny, "--run.directory", tmp_path / "run"), "WORLD_SIZE is 2", "MASTER_ADDR", "torchrun")
    assert not (tmp_path / "run").exists()


def test_maps_that_would_be_one_file(anomem: Command, finished: Path, tmp_path: Path) -> None:
    for suffix in ("png", "bmp"):
        Image.new("L", (16, 16)).save(tmp_path / f"black.{suffix}")
    done = anomem("score", tmp_path, "--run", finished, "--maps", tmp_path / "maps")
    complains(done, "`--maps`", "different names", "black.tiff")


@pytest.mark.parametrize("option", ["--optimizer.batch-size=1", "--unknown"])
def test_of_several_processes_the_first_says_what_is_wrong(
    anomem: Command, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        done = anomem("train", option)
        assert done.code == 2
        assert bool(done.err) == said
        assert done.out == ""
