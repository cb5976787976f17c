"""Checkpoints: what is written is read; what is damaged or of another shape is said so."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from anomem.errors import UserError
from anomem.files import write_atomically
from anomem.train.checkpoint import load_checkpoint, load_module, save_checkpoint


def test_round_trip_and_replacement(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "stage1", 1, {"a": torch.zeros(2)})
    (tmp_path / ".stage1-00000002.safetensors.0f3a").write_bytes(b"of a process that was killed while it wrote")
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7), "c": torch.ones(1, dtype=torch.bfloat16)}
    save_checkpoint(tmp_path, "stage1", 2, tensors, {"size": [4, 4]})
    found = load_checkpoint(tmp_path, "stage1")
    assert found is not None
    assert (found.step, found.about) == (2, {"size": [4, 4]})
    assert all(torch.equal(found.tensors[key], tensors[key]) for key in tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stage1-00000002.safetensors", "stage1.json"]
    assert load_checkpoint(tmp_path, "stage2") is None


@pytest.mark.parametrize("victim", ["stage1-00000002.safetensors", "stage1.json"])
def test_truncated(tmp_path: Path, victim: str) -> None:
    save_checkpoint(tmp_path, "stage1", 2, {"a": torch.randn(100)})
    path = tmp_path / victim
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path, "stage1")


def test_tensor_file_gone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "stage1", 2, {"a": torch.randn(100)})
    (tmp_path / "stage1-00000002.safetensors").unlink()
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path, "stage1")


def test_other_format(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "stage1", 2, {"a": torch.randn(1)})
    note = json.loads((tmp_path / "stage1.json").read_text())
    (tmp_path / "stage1.json").write_text(json.dumps({**note, "format": 99}))
    with pytest.raises(UserError, match="format 99, expected 2"):
        load_checkpoint(tmp_path, "stage1")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.weight": torch.zeros(2, 3)}, r"has no tensor `m\.bias`"),
        ({"m.weight": torch.zeros(2, 3), "m.bias": torch.zeros(2), "m.x": torch.zeros(1)}, r"unexpected tensor `m\.x`"),
        (
            {"m.weight": torch.zeros(2, 4), "m.bias": torch.zeros(2)},
            r"`m\.weight` expected \[2, 3\], received \[2, 4\]",
        ),
    ],
)
def test_another_models_tensors(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_module(nn.Linear(3, 2), tensors, "m.", Path("x.json"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=rf"cannot write {target}: No space left on device"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("detector", "check the images and the encoder's weights"), ("stage2", "lower --stage2.optimizer.learning-rate")],
)
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, name: str, advice: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: the values of `x` are not finite.*; {advice}"):
        save_checkpoint(tmp_path / "new", name, 0, {"x": torch.tensor([1.0, torch.nan])})
    assert not (tmp_path / "new").exists()
