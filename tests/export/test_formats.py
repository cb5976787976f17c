"""Written files: equal to the run, described, checked, without pickled code."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.cli import main
from anomem.errors import UserError
from anomem.export import FORMATS, Exported, Program, compared, export
from anomem.export import formats as formats_module
from anomem.export.run import noise
from anomem.scoring import FittedDetector
from anomem.train import save_detector
from tests.train.test_fitting import parts

Files = Callable[[str], Exported]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_says_what_the_run_says(exported: Files, detector: FittedDetector, name: str) -> None:
    """Batches of one and of many, and sizes that the program was not traced with."""
    done = exported(name)
    assert done.parity.passed
    run = FORMATS[name].runner(done.file)
    program = Program(detector)
    for images in (parts(1, 7), parts(64, 8), parts(3, 9, defect=True)):
        assert compared(detector, program, run, images).passed, images.shape
    large = torch.nn.functional.interpolate(parts(2, 3).float(), (90, 70)).to(torch.uint8)
    parity = compared(detector, program, run, large)
    assert max(parity.score, parity.map) < (1e-6 if name == "pt2" else 5e-3), parity


@pytest.mark.parametrize("name", FORMATS)
def test_metadata(exported: Files, name: str) -> None:
    done = exported(name)
    about = json.loads(done.metadata_file.read_text())
    assert about == done.metadata
    assert [given["name"] for given in about["outputs"]] == ["score", "p_value", "verdict", "map"]
    assert about["input"]["shape"] == ["B", 3, "H", "W"]
    assert (about["alpha"], about["parity"]["images"], about["parity"]["passed"]) == (0.1, 64, True)
    assert set(about["sha256"]) == {path.name for path in done.file.parent.iterdir() if path != done.metadata_file}


def test_a_pt2_file_holds_nothing_pickled(exported: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    done = exported("pt2")
    with zipfile.ZipFile(done.file) as archive:
        for entry in archive.namelist():
            assert not archive.read(entry).startswith((b"\x80", b"PK")), entry

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for place, attribute in ((pickle, "loads"), (pickle, "load"), (torch, "load")):
        monkeypatch.setattr(place, attribute, refuse)
    torch.export.load(done.file).module()(parts(2))


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_foreign_pt2_file_runs_no_code_where_the_documented_variable_is_set(
    exported: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tmp_path / "evil.pt2"
    torch.save(((Evil(tmp_path / "executed"),), {}), tmp_path / "pickled")
    with zipfile.ZipFile(exported("pt2").file) as archive, zipfile.ZipFile(evil, "w") as out:
        inputs = [entry for entry in archive.namelist() if "sample_inputs" in entry]
        assert len(inputs) == 1
        for entry in archive.namelist():
            out.writestr(entry, (tmp_path / "pickled").read_bytes() if entry in inputs else archive.read(entry))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.export.load(evil)
    assert not (tmp_path / "executed").exists()
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")  # without it the fallback is real
    with contextlib.suppress(TypeError):  # torch's warning about it has an argument too few
        torch.export.load(evil)
    assert (tmp_path / "executed").exists()


def _scores(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [outputs[0] + 0.01, *outputs[1:]]


def _verdicts(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [*outputs[:2], ~outputs[2], outputs[3]]


def _maps(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [*outputs[:3], outputs[3].roll(1, dims=2)]


def _p_values(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [outputs[0], outputs[1] + 1 / 25, *outputs[2:]]


@pytest.mark.parametrize("wrong", [_scores, _verdicts, _maps, _p_values])
def test_a_file_that_says_something_else_is_not_written(
    detector: FittedDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., list[Tensor]]
) -> None:
    program = Program(detector, portable=False)

    def runner(_: Path) -> Callable[[Tensor], list[Tensor]]:
        return torch.no_grad()(lambda images: wrong(program(images)))

    fake = replace(FORMATS["pt2"], contents=lambda _: {".pt2": b"x"}, runner=runner)
    monkeypatch.setitem(formats_module.FORMATS, "pt2", fake)
    with pytest.raises(UserError, match="does not say what the run says"):
        export(detector, "pt2", tmp_path / "model.pt2", images=parts(16, 5))
    assert list(tmp_path.iterdir()) == []


def test_command_line(detector: FittedDetector, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    save_detector(detector, run)
    code = main(["export", str(run), "--format", "pt2"])
    said = capsys.readouterr()
    assert code == 0, said.err
    for text in ("takes: images [B, 3, H, W] uint8", "verdict at alpha 0.1: about 10.00%", "noise", "model.pt2.json"):
        assert text in said.out, text
    assert (run / "export" / "model.pt2").is_file()


def test_mistakes_are_one_sentence(
    detector: FittedDetector, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save_detector(detector, run)
    (run / "export").mkdir()
    (run / "export" / "model.pt2").write_bytes(b"mine")
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "checkpoints")
    older = shutil.copytree(run, tmp_path / "older")
    note = older / "checkpoints" / "detector.json"
    note.write_text(note.read_text().replace('"format": 2', '"format": 1'))
    for arguments, sentence in (
        ((tmp_path / "nothing",), "holds no run"),
        ((unfinished, "--format", "pt2"), "is not finished"),
        ((older, "--format", "pt2"), "has format 1, expected 2"),
        ((run, "--format", "pt2"), "exists; choose another name, or add --overwrite"),
        ((run, "--format", "pt2", "--output", tmp_path / "model.onnx"), "expected a .pt2 file"),
        ((run, "--format", "pt2", "--alpha", "0.01", "--overwrite"), "0.01 needs 99 normals"),
        ((run, "--format", "pt2", "--by", "energy", "--overwrite"), "one of 'plain'"),
    ):
        code = main(["export", *map(str, arguments)])
        said = capsys.readouterr()
        assert (code, said.err.count("\n")) == (2, 1), (arguments, said.err)
        assert sentence in said.err, said.err
    assert (run / "export" / "model.pt2").read_bytes() == b"mine"
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    assert main(["export", str(run), "--format", "openvino"]) == 2
    assert "pip install anomem[export]" in capsys.readouterr().err


def test_noise_has_the_look_of_the_normals(detector: FittedDetector) -> None:
    images = noise(detector, 4)
    assert images.shape == (4, 3, 64, 64)
    assert 20 < float(images.float().std()) < 110
