"""`anomem reproduce mvtec` on two small classes, one in MVTec-AD's layout and one in VisA's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anomem.cli import main
from anomem.errors import UserError
from anomem.reproduce import EXPERIMENTS, Scale, Sweep, read_rows, run
from anomem.scoring import FillConfig
from anomem.train import FitConfig
from anomem.train import fit as fit_


def test_all_classes_with_all_measures(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(images: object, *, aligned: bool, config: FitConfig) -> object:
        # The pretrained encoder is a package of its own; 1,024 prototypes and folds take half a minute.
        quick = FitConfig(encoder="small", fill=FillConfig("random", (16,)), alpha=0.3, run=config.run)
        return fit_(images, aligned=aligned, config=quick)  # type: ignore[arg-type]

    settings = EXPERIMENTS["mvtec"].settings
    assert isinstance(settings, dict)
    monkeypatch.setitem(settings, "fit", replace(settings["fit"], change=settings["train"].change))  # 64 pixels
    monkeypatch.setattr("anomem.train.fitting.SMALL_STEPS", 2)
    monkeypatch.setattr("anomem.reproduce.measures.fit", small)
    out = tmp_path / "out"
    options = ["--data.root", str(classes), "--epochs", "1", "--jobs", "1", "--device", "cpu", "--output", str(out)]
    assert main(["reproduce", "mvtec", *options, "--quiet"]) == 0
    rows = read_rows(out / "rows.jsonl")
    assert {(row["setting"], row["normal"]) for row in rows} == {
        (s, c) for s in ("fit", "train") for c in ("bolt", "nut")
    }
    for row in rows:
        assert set(row["metrics"]["lead"]) >= {"auroc", "pixel_auroc", "aupro", "aupimo"}
    assert {row["class"] for row in rows} == {"bolt", "nut"}, "not the name of their folders of good images"
    assert {p.name for p in (out / "splits").iterdir()} == {"folder-bolt-seed0.json", "folder-nut-seed0.json"}
    found = next(row for row in rows if (row["setting"], row["normal"]) == ("fit", "bolt"))
    assert found["metrics"]["lead"]["auroc"] == 1
    assert found["metrics"]["lead"]["pixel_auroc"] > 0.8
    table = (out / "table.md").read_text()
    for heading in ("| setting | AUROC % `lead` | pixel AUROC | AUPRO | AUPIMO |", "AUPIMO % class by class:"):
        assert heading in table
    assert table.count("| setting | bolt | nut | mean |") == 4
    assert table.startswith("# Classes of a folder: MVTec-AD, MVTec LOCO or VisA (parts)\n")


def test_folders_without_classes_are_named(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(root: Path, *options: str) -> str:
        assert main(["reproduce", "mvtec", "--data.root", str(root), "--output", str(tmp_path / "out"), *options]) == 2
        return capsys.readouterr().err

    assert f"found none; it is one class itself: give {classes}\n" in said(classes / "bolt")
    assert "expected folders of classes with train/ (MVTec) or Data/Images (VisA)" in said(classes / "bolt" / "test")
    assert "cannot list the folder" in said(tmp_path / "nowhere")
    assert "`classes`: expected one of bolt, nut, received 'screw'" in said(classes, "--classes", "bolt", "screw")
    assert "`--data`: mvtec runs on the folders of --data.root" in said(classes, "--data", "digits")


def test_another_root_is_another_sweep(classes: Path, tmp_path: Path) -> None:
    first = Sweep("mvtec", "folder", tmp_path / "out", str(classes), scale=Scale(epochs=1))
    assert [cell.normal for cell in first.cells] == ["bolt", "nut"] * 2
    (tmp_path / "out").mkdir()
    header = '{"experiment": "mvtec", "data": "parts", "root": "../other/parts", "commit": "x", "command": "y"}'
    (tmp_path / "out" / "sweep.json").write_text(header)
    with pytest.raises(UserError, match=r'its root is "../other/parts", here "../parts"'):
        run(first, lambda line: None)
