"""CIFAR read from files in the official format."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from anomem.data import DataConfig, load_task
from anomem.data.bundled import SUPERCLASSES
from anomem.errors import UserError


def write(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files in the official format; torchvision is told not to compare their checksums."""
    for kind in (CIFAR10, CIFAR100):
        for name in ("train_list", "test_list"):
            monkeypatch.setattr(kind, name, [[file, None] for file, _ in getattr(kind, name)])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    random = np.random.default_rng(0)
    for file, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        write(tmp_path / CIFAR10.base_folder / file, {"data": pixels, "labels": [i % 10 for i in range(20)]})
    write(tmp_path / CIFAR10.base_folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    for file in ("train", "test"):
        pixels = random.integers(0, 256, (100, 3072), dtype=np.uint8)
        labels = {"fine_labels": list(range(100)), "coarse_labels": [i % 20 for i in range(100)]}
        write(tmp_path / CIFAR100.base_folder / file, {"data": pixels, **labels})
    write(tmp_path / CIFAR100.base_folder / "meta", {"fine_label_names": [f"fine {i}" for i in range(100)]})
    return tmp_path


def test_cifar10(root: Path) -> None:
    config = DataConfig("cifar10", root=str(root), normal="class 4")
    task = load_task(config)
    assert (len(task.train), len(task.test)) == (10, 20)
    assert (task.train.channels, task.train.size) == (3, (32, 32))
    assert [kind == "class 4" for kind in task.test_kinds] == (~task.test_is_anomaly).tolist()
    raw = pickle.loads((root / CIFAR10.base_folder / "data_batch_1").read_bytes())
    first, _ = next(task.train.batches(torch.tensor([0]), 1))
    assert torch.equal(first[0].flatten(), torch.from_numpy(raw["data"][4])), "channels, rows, columns"
    assert len(load_task(replace(config, normal="4", outlier_ratio=0.5)).train) == 15


def test_cifar100_has_20_superclasses(root: Path) -> None:
    assert len(set(SUPERCLASSES)) == 20
    task = load_task(DataConfig("cifar100", root=str(root), normal="people"))
    assert (len(task.train), len(task.test)) == (5, 100)
    assert int((~task.test_is_anomaly).sum()) == 5
    assert set(task.test_kinds) == set(SUPERCLASSES)


def test_missing_files(tmp_path: Path) -> None:
    for name, file in (("cifar10", "cifar-10-batches-py/data_batch_1"), ("cifar100", "cifar-100-python/train")):
        with pytest.raises(UserError, match=rf"expected the file {tmp_path}/{file}, which is not there; download http"):
            load_task(DataConfig(name, root=str(tmp_path)))


def test_one_missing_file_is_named(root: Path) -> None:
    (root / CIFAR10.base_folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3, which is not there"):
        load_task(DataConfig("cifar10", root=str(root)))


def test_wrong_checksum(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR100, "test_list", [["test", "0" * 32]])
    with pytest.raises(UserError, match=r"expected the official files in .*, but their checksums differ; remove"):
        load_task(DataConfig("cifar100", root=str(root)))
