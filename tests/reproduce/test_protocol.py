"""Protocols: CIFAR's classes and archives, epochs as steps, subsets, splits as files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10

from anomem.cli import main
from anomem.data import DataConfig, Task, load_task
from anomem.data.bundled import SUPERCLASSES, load_digits
from anomem.data.folder import ImageFiles
from anomem.errors import UserError
from anomem.reproduce import CLASSES, EXPERIMENTS, Scale, Sweep
from anomem.reproduce.cell import Cell
from anomem.reproduce.protocol import base_config, scaled, scaled_task, write_split
from anomem.reproduce.sweep import estimate
from anomem.train import TrainConfig, preset
from tests.data.test_cifar import root as cifar  # noqa: F401  (a fixture: small files in the official format)


def test_the_papers_setting_is_a_preset() -> None:
    config = preset("paper")
    assert (config.data.dataset, config.model.backbone, config.optimizer.batch_size) == ("cifar10", "resnet50", 1024)
    assert config.augment.crop_area == (0.3, 1.0)
    assert min(config.augment.flip, config.augment.jitter, config.augment.blur, config.augment.noise) > 0
    assert (config.loss.variance_weight, config.model.scale_weights, config.stage2.margin) == (0.05, "exp", 2.0)
    assert config.synthetic_outliers == 0
    # 200 epochs of a class: 5,000 images of CIFAR-10 are four batches, 2,500 of a superclass two.
    assert config.optimizer.steps == scaled(base_config("cifar10", "data"), Scale(), 5000).optimizer.steps == 800
    superclass = scaled(base_config("cifar100", "data"), Scale(), 2500)
    assert (superclass.optimizer.steps, superclass.optimizer.warmup) == (400, 20)
    assert superclass.stage2.optimizer.steps == config.stage2.optimizer.steps // 2


def test_epochs_are_steps() -> None:
    config = base_config("digits", "data")
    assert scaled(config, Scale(), 128) == config
    short = scaled(config, Scale(epochs=3), 128)
    assert (short.optimizer.steps, short.optimizer.warmup, short.stage2.optimizer.steps) == (3, 0, 3)
    assert scaled(config, Scale(epochs=3), 3000).optimizer.steps == 6
    assert scaled(config, Scale(steps=7), 3000) == scaled(config, Scale(epochs=7), 128)
    assert scaled(base_config("cifar10", "data"), Scale(steps=7), 5000).optimizer.steps == 7
    assert scaled(config, Scale(epochs=900), 128).optimizer.warmup == config.optimizer.warmup


def test_every_experiment_makes_valid_settings() -> None:
    for name, experiment in EXPERIMENTS.items():
        for data in experiment.data:
            for setting in experiment.settings.values():
                config = Cell(name, data, "data", "", "0", 1).config(setting)
                assert (config.data.seed, config.run.seed) == (1, 1)
    assert len(CLASSES["cifar10"]) == 10
    assert len(CLASSES["cifar100"]) == len(SUPERCLASSES) == 20


def test_a_subset_keeps_the_ratio_and_is_drawn_by_seed() -> None:
    task = load_task(DataConfig("digits", normal="3", outlier_ratio=0.1))
    small = scaled_task(task, Scale(subset=40), 0)
    assert (len(small.train), int((~small.train_is_normal).sum())) == (44, 4)
    assert (len(small.test), int(small.test_is_anomaly.sum())) == (80, 40)
    assert small.rows is not None
    assert task.rows is not None
    everything = load_digits()
    assert [kind == "3" for kind in small.test_kinds] == (~small.test_is_anomaly).tolist()
    assert torch.equal(everything.images[small.rows.test], next(small.test.batches(torch.arange(80), 80))[0])
    assert torch.equal(everything.labels[small.rows.train] == 3, small.train_is_normal)
    same, other = (scaled_task(task, Scale(subset=40), seed).rows for seed in (0, 1))
    assert same is not None
    assert other is not None
    assert torch.equal(same.train, small.rows.train)
    assert not torch.equal(other.train, small.rows.train)
    assert scaled_task(task, Scale(), 0) is task


def test_splits_are_files_for_other_methods(tmp_path: Path) -> None:
    config = DataConfig("digits", normal="3", outlier_ratio=0.05, seed=2)
    task = load_task(config)
    path = write_split(task, config, tmp_path / "splits")
    assert path.name == "digits-3-seed2-5%.json"
    split, everything = json.loads(path.read_text()), load_digits()
    assert set(everything.labels[split["train_normal"]].tolist()) == {3}
    assert 3 not in everything.labels[split["train_anomalous"]].tolist()
    assert len(split["train_anomalous"]) == round(0.05 * len(split["train_normal"]))
    parts = [split[name] for name in ("train_normal", "train_anomalous", "test_normal", "test_anomalous")]
    assert len({i for part in parts for i in part}) == sum(map(len, parts)), "no image is in two parts"
    images, _ = next(task.train.batches(torch.arange(len(task.train)), 1000))
    assert torch.equal(images, everything.images[split["train_normal"] + split["train_anomalous"]])


def test_splits_of_drawn_images_hold_the_images(tmp_path: Path) -> None:
    config = DataConfig("textures", normal="brick", train_patches=5, test_patches=3)
    task = load_task(config)
    held = load_file(write_split(task, config, tmp_path))
    assert torch.equal(held["train"], next(task.train.batches(torch.arange(5), 5))[0])
    assert (held["test"].shape, int(held["test_is_anomaly"].sum())) == ((6, 1, 64, 64), 3)


def test_splits_of_folders_name_files(classes: Path, tmp_path: Path) -> None:
    config = DataConfig("folder", root=str(classes / "bolt"), normal="")
    split = json.loads(write_split(load_task(config), config, tmp_path).read_text())
    assert split["train_normal"] == [f"train/good/{i}.png" for i in range(8)]
    assert split["test_anomalous"] == [f"test/scratch/{i}.png" for i in range(3)]
    small = scaled_task(load_task(config), Scale(subset=2), 0)
    split = json.loads(write_split(small, config, tmp_path, "bolt").read_text())
    assert split["normal"] == "bolt"
    assert {part: len(names) for part, names in split.items() if part.startswith("t")} == {
        "train_normal": 2, "train_anomalous": 0, "test_normal": 2, "test_anomalous": 2,
    }  # fmt: skip
    image, _ = next(small.train.batches(torch.tensor([0]), 1))
    assert torch.equal(image[0], ImageFiles([classes / "bolt" / split["train_normal"][0]], 128)[0])


def test_splits_of_cifar_are_rows_of_the_official_files(cifar: Path, tmp_path: Path) -> None:  # noqa: F811
    for data, normal, train, test in (("cifar10", "4", 10, 2), ("cifar100", "people", 5, 5)):
        config = DataConfig(data, root=str(cifar), normal=normal)
        split = json.loads(write_split(load_task(config), config, tmp_path).read_text())
        assert (len(split["train_normal"]), len(split["test_normal"])) == (train, test)
    assert split["normal"] == "people"
    assert {row % 20 for row in split["train_normal"]} == {SUPERCLASSES.index("people")}


def test_cifar_runs_for_real_on_small_files(cifar: Path, tmp_path: Path) -> None:  # noqa: F811
    small = ["--settings", "untrained", "--seeds", "0", "--epochs", "1", "--subset", "2", "--device", "cpu", "--quiet"]
    command = ["reproduce", "table6", "--data", "cifar10", "--data.root", str(cifar), *small]
    with pytest.MonkeyPatch.context() as patch:
        # The paper's encoder takes a minute of a CPU.
        patch.setattr(
            "anomem.reproduce.protocol.preset", lambda _: replace(preset("paper"), model=preset("digits").model)
        )
        assert main([*command, "--classes", "class 4", "--output", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| untrained |" in table
    assert "| – |" in table, "the paper's column stands beside it"


def test_a_missing_class_of_cifar_fails_before_the_first_cell(
    cifar: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--data", "cifar10", "--data.root", str(cifar), "--classes", "class 1", "dragon"]
    assert main(["reproduce", "table7", *options, "--output", str(tmp_path / "out")]) == 2
    assert "`data.normal`: expected one of class 0, class 1" in capsys.readouterr().err
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_a_half_downloaded_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"found the archive .*; it is incomplete or damaged: download http.* again"):
        load_task(DataConfig("cifar10", root=str(tmp_path)))
    monkeypatch.setattr(CIFAR10, "tgz_md5", "9c5d0f6ef3d4f6c0c1fd0d5b0f8a6f10")
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_task(DataConfig("cifar10", root=str(tmp_path)))
    monkeypatch.setattr(CIFAR10, "tgz_md5", None)  # torchvision then checks nothing
    with pytest.raises(UserError, match="it is whole: unpack it there"):
        load_task(DataConfig("cifar10", root=str(tmp_path)))


def test_the_papers_setting_is_estimated_before_it_starts(
    cifar: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = []

    def seconds(config: TrainConfig, task: Task, at_most: int) -> tuple[float, float]:
        timed.append((config.model.backbone, config.optimizer.batch_size, len(task.train), at_most))
        return 3.0, 3.0

    monkeypatch.setattr("anomem.reproduce.sweep.seconds_per_step", seconds)
    sweep = Sweep("table7", "cifar10", tmp_path, str(cifar), seeds=(0,), jobs=1, device="cpu")
    said = estimate(sweep, sweep.cells)
    assert timed == [("resnet50", 1024, 10, 32)]
    # These files hold ten images of a class: a step an epoch. Ten classes, two settings and an untrained control.
    assert "30 cells in 1 processes" in said
    assert "stage 1 of linear: 200 steps of 10 images, about 10 min a class" in said
    assert "stage 1 takes 3 h 20 min in all (from steps of 10 images)" in said
