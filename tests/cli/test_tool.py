"""`anomem score` as a tool of work: folders of folders, pictures, JSON lines, another device, a watched folder."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomem.cli import main
from tests.cli.conftest import Outcome
from tests.train.test_fitting import parts, write

Command = Callable[..., Outcome]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tool") / "parts"
    write(root / "good", parts(20))
    write(root / "test" / "good", parts(3, 1))
    write(root / "test" / "spot", parts(3, 2, defect=True))
    return root


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    path = photos.parent / "run"
    options = ["--encoder=efficientnet_lite0", "--weights=none", "--data.image-size=64", "--run.device=cpu",
               "--alpha=0.1", "--scales", "block3", "--fill.prototypes", "16"]  # fmt: skip
    assert main(["fit", str(photos), *options, "--run.directory", str(path), "--quiet"]) == 0
    return path


def test_folders_of_folders_as_json_lines(anomem: Command, run: Path, photos: Path) -> None:
    done = anomem("score", photos / "test", "--run", run, "--recursive", "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [Path(row["path"]).parent.name for row in rows] == ["good"] * 3 + ["spot"] * 3
    assert [row["verdict"] for row in rows[3:]] == ["anomalous"] * 3
    assert anomem("score", photos / "test", "--run", run).code == 2  # as before: no image in the folder itself


def test_pictures_beside_the_maps(anomem: Command, run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(photos / "test" / "spot" / "00.png", tmp_path / "in" / "bad.png")
    shutil.copy(photos / "test" / "good" / "00.png", tmp_path / "in" / "good.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    command = ("score", tmp_path / "in", "--run", run, "--maps", tmp_path / "maps", "--overlays", "--masks",
               "--sheet", tmp_path / "sheet.png")  # fmt: skip
    for _ in range(2):  # the second time the files are ours
        done = anomem(*command)
        assert (done.code, "2 images were scored; failures: 1" in done.err) == (1, True), done.err
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        "bad.mask.png", "bad.overlay.png", "bad.tiff", "good.mask.png", "good.overlay.png", "good.tiff",
    ]  # fmt: skip
    mask = np.asarray(Image.open(tmp_path / "maps" / "bad.mask.png"))
    heat = np.asarray(Image.open(tmp_path / "maps" / "bad.tiff"))
    assert set(np.unique(mask)) == {0, 255}
    assert heat[mask == 255].min() > heat[mask == 0].max()
    assert mask[8:24, 40:56].mean() > mask[40:, :32].mean(), "the spot is found"
    plain = np.asarray(Image.open(tmp_path / "in" / "bad.png")).astype(int)
    laid = np.asarray(Image.open(tmp_path / "maps" / "bad.overlay.png")).astype(int)
    changed = np.abs(laid - plain).sum(axis=2) > 30
    assert changed[mask == 255].all()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 200 + 8, 234 + 8)
    (tmp_path / "maps" / "good.mask.png").write_bytes((tmp_path / "in" / "good.png").read_bytes())
    refused = anomem(*command)
    assert (refused.code, "was not written by anomem" in refused.err) == (2, True)


def test_a_run_of_another_machine(anomem: Command, run: Path, photos: Path, tmp_path: Path) -> None:
    """Its device and its images are not here; its configuration is left as it is."""
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["run"]["device"], config["data"]["root"] = "cuda:7", "/nowhere"
    (copy / "config.json").write_text(json.dumps(config))
    before = (copy / "config.json").read_bytes()
    picture = photos / "test" / "good" / "00.png"
    assert "run.device" in anomem("score", picture, "--run", copy).err
    for arguments in (
        ("score", picture, "--run", copy, "--device", "cpu"),
        ("evaluate", copy, "--device", "cpu", "--data.root", photos, "--no-baselines"),
        ("plot", copy, "--device", "cpu", "--data.root", photos),
    ):
        done = anomem(*arguments)
        assert done.code == 0, done.err
    assert (copy / "config.json").read_bytes() == before


def test_a_watched_folder(run: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arriving"
    folder.mkdir()
    shutil.copy(photos / "test" / "good" / "00.png", folder / "first.png")
    command = [
        sys.executable,
        "-m",
        "anomem",
        "score",
        str(folder),
        "--run",
        str(run),
        "--watch",
        "--json",
        "--alpha",
        "0.1",
        "--maps",
        str(tmp_path / "maps"),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs, and so these tests, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["path"].endswith("first.png")
    (folder / "broken.png").write_bytes(b"no image")
    shutil.copy(photos / "test" / "spot" / "00.png", folder / "first.PNG")
    shutil.copy(photos / "test" / "spot" / "00.png", folder / "second.png")
    second = json.loads(process.stdout.readline())
    assert (Path(second["path"]).name, second["verdict"]) == ("second.png", "anomalous")
    shutil.copy(photos / "test" / "spot" / "00.png", folder / "first.png")
    again = json.loads(process.stdout.readline())
    assert (Path(again["path"]).name, again["verdict"]) == ("first.png", "anomalous")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "broken.png: expected a readable image" in said
    assert "first.PNG: expected a name of its own, but its map would be that of" in said
    assert "3 images were scored, 2 could not be; no drift in 3 images" in said
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["first.tiff", "second.tiff"]


def test_mistakes_are_one_sentence(anomem: Command, run: Path, finished: Path, photos: Path, tmp_path: Path) -> None:
    picture = photos / "test" / "good" / "00.png"
    for arguments, sentence in (
        ((picture, "--run", run, "--overlays"), "`--overlays`: expected --maps"),
        ((picture, "--run", run, "--sheet", tmp_path / "sheet.jpg"), "expected a .png file"),
        ((picture, "--run", run, "--watch"), f"`--watch`: expected one folder, received {picture}"),
        ((photos / "good", "--run", run, "--watch", "--fdr", "0.1"), "neither --fdr nor --sheet"),
        ((picture, "--run", finished, "--maps", tmp_path / "maps", "--masks"), "expected a fitted run"),
        ((picture, "--run", run, "--device", "tpu9"), "expected a device of this machine"),
        ((picture, "--run", run, "--max-megapixels", "0"), "`--max-megapixels`: expected an integer ≥ 1"),
        ((picture, "--run", run, "--alpha", "0"), "`--alpha`"),
        ((picture, "--run", run, "--data.root", tmp_path / "none"), "`--data.root`: expected a folder"),
        ((picture, "--run", run, "--device", "mps"), "from the 'MPS' backend\n"),
    ):
        done = anomem("score", *arguments)
        assert (done.code, done.err.count("\n")) == (2, 1), (arguments, done.err)
        assert sentence in done.err, done.err


def test_a_watched_folder_writes_over_no_other_file(anomem: Command, run: Path, photos: Path, tmp_path: Path) -> None:
    """Before anything is scored; the name must be one of a table, too."""
    thesis = tmp_path / "thesis.csv"
    thesis.write_text("chapter,pages\n")
    for output, sentence in ((thesis, "--output"), (tmp_path / "scores.txt", "expected a .csv or .json file")):
        done = anomem("score", photos / "test" / "good", "--run", run, "--watch", "--output", output)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert sentence in done.err
    assert thesis.read_text() == "chapter,pages\n"


def test_folders_named_by_a_stream_are_searched_as_others(
    anomem: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "images" / "inner"
    inner.mkdir(parents=True)
    for file in (inner.parent / "a.png", inner / "b.png"):
        Image.new("RGB", (40, 30), (90, 120, 60)).save(file)
    for options, count in (((), 1), (("--recursive",), 2)):
        names = io.TextIOWrapper(io.BytesIO(f"{inner.parent}\n".encode()))
        monkeypatch.setattr(sys, "stdin", names)
        done = anomem("score", "-", "--run", run, *options)
        assert (done.code, len(done.out.splitlines())) == (0, count), done.err
