"""Commands in the processes that torchrun starts, and `--profile`."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomem.cli import main
from tests.cli import jobs
from tests.processes import in_processes


def test_processes_score_a_folder_as_one_does(finished: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for shade in range(5):
        Image.new("L", (16, 16), 40 * shade).save(photos / f"{shade}.png")
    (photos / "4.png").write_bytes(b"no image")
    alone, together = tmp_path / "alone.csv", tmp_path / "together.csv"
    score = ["score", str(photos), "--run", str(finished), "--overlays"]
    outputs = [
        ["--output", str(rows), "--maps", str(rows.with_suffix("")), "--sheet", str(rows.with_suffix(".png"))]
        for rows in (alone, together)
    ]
    assert main([*score, *outputs[0]]) == 1  # one of the images is none
    in_processes(2, jobs.command, [*score, *outputs[1]], 1, str(tmp_path))
    expected, found = (list(csv.DictReader(path.open())) for path in (alone, together))
    assert [row["path"] for row in found] == [row["path"] for row in expected]
    for row, other in zip(found, expected, strict=True):  # to rounding: of other batches
        for name in ("plain", "prior", "energy", "detector"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)
    assert (tmp_path / "out0").read_text() == f"4 scores written to {together}\n"
    assert "4 images were scored; failures: 1" in (tmp_path / "err0").read_text()
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""
    # One scale of colours in all processes, and one sheet of the images of all.
    for picture in (*(f"alone/{shade}.overlay.png" for shade in range(4)), "alone.png"):
        one, other = (np.asarray(Image.open(tmp_path / p)) for p in (picture, picture.replace("alone", "together")))
        assert one.shape == other.shape, picture
        if picture != "alone.png":  # on the sheet the last digit of a score may differ
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 2, picture


def test_a_profile_of_the_real_loop(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    assert main(["train", *tiny, "--run.directory", str(tmp_path / "run"), "--profile", "2"]) == 0
    assert os.environ["KINETO_LOG_LEVEL"] == "99"  # read once a process, so its silence cannot be seen here
    lines = capsys.readouterr().out.splitlines()
    phases = ["batch", "augment", "encode", "contrast", "backward", "optimizer", "step"]
    setting, *table = lines[:-1]
    assert re.fullmatch(r"(float32|bf16), (contiguous|channels_last), batch of \d+", setting)
    assert [line.split()[0] for line in table] == phases
    assert lines[-2].endswith("images/s")
    trace = tmp_path / "run-trace.json.gz"
    assert lines[-1] == f"trace of 2 steps in {trace}; open it in ui.perfetto.dev"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {f"anomem.{phase}" for phase in phases[:-1]} <= names
    assert not (tmp_path / "run").exists()
    assert main(["train", "--profile", "2", "--resume", str(tmp_path / "run")]) == 2
    assert "`--profile` trains no run" in capsys.readouterr().err


def test_processes_profile_their_loop(tiny: list[str], tmp_path: Path) -> None:
    profiled = ["train", *tiny, "--run.directory", str(tmp_path / "run"), "--profile", "2"]
    in_processes(2, jobs.command, profiled, 0, str(tmp_path))
    *table, last = (tmp_path / "out0").read_text().splitlines()
    assert last == f"trace of 2 steps in {tmp_path / 'run-trace.json.gz'}; open it in ui.perfetto.dev"
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""
    assert [path.name for path in tmp_path.glob("*.gz")] == ["run-trace.json.gz"]  # of the first alone
    milliseconds, images = float(table[-1].split()[1]), float(table[-1].split()[-2])
    assert images == pytest.approx(32 / (milliseconds / 1000), abs=1)  # the batch of the whole job
