"""What the commands read and write: nothing lost, nothing outside, one bad file among many, names of any kind."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomem.data import DataConfig
from anomem.scoring import Scored, Scorer
from anomem.train.config import TrainConfig, preset
from anomem.train.rundir import default_directory

Command = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
ODD = os.fsdecode(b"caf\xe9 \xff.png")  # not UTF-8


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, one of them a TIFF."""
    for i, suffix in enumerate(("png", "tiff", "bmp")):
        picture(tmp_path / "photos" / f"{i}.{suffix}", i)
    return tmp_path / "photos"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "anomem", *map(os.fspath, map(str, arguments))]
    return subprocess.run(command, capture_output=True, cwd=ROOT, check=False, **options)


# Nothing is lost.


def test_maps_never_replace_the_images(anomem: Command, finished: Path, photos: Path) -> None:
    before = contents(photos)
    for options in ((), ("--overwrite",)):
        done = anomem("score", photos / "1.tiff", "--run", finished, "--maps", photos, *options)
        assert (done.code, done.out) == (2, "")
        assert "`--maps`" in done.err
        assert "is an input, which is never written over" in done.err
        assert contents(photos) == before


def test_maps_do_not_replace_through_links(anomem: Command, finished: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    os.link(photos / "1.tiff", tmp_path / "maps" / "1.tiff")
    before = contents(tmp_path)
    done = anomem("score", photos / "1.tiff", "--run", finished, "--maps", tmp_path / "maps", "--overwrite")
    assert (done.code, "is an input" in done.err) == (2, True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["photos", "other photos", "data/test/cut", "data/train"])
def test_maps_do_not_go_into_folders_of_images(
    anomem: Command, finished: Path, photos: Path, tmp_path: Path, place: str
) -> None:
    picture(tmp_path / "other photos" / "x.png")
    picture(tmp_path / "data" / "train" / "good" / "x.png")
    picture(tmp_path / "data" / "test" / "good" / "x.png")
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "data")
    (run / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path)
    command = ("score", photos / "0.png", "--run", run, "--maps", tmp_path / place)
    done = anomem(*command)
    assert (done.code, done.out) == (2, "")
    assert "--overwrite" in done.err
    assert contents(tmp_path) == before
    assert anomem(*command, "--overwrite").code == 0


def test_what_is_not_ours_is_kept(anomem: Command, finished: Path, photos: Path, tmp_path: Path) -> None:
    theirs = {"scores.csv": b"my,own\n1,2\n", "scores.json": b'{"my": "own"}', "maps/0.tiff": b"mine"}
    for name, content in theirs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for option, name in (("--output", "scores.csv"), ("--output", "scores.json"), ("--maps", "maps")):
        command = ("score", photos / "0.png", "--run", finished, option, tmp_path / name)
        done = anomem(*command)
        assert (done.code, done.out) == (2, "")
        assert f"`{option}`" in done.err
        assert "exists and was not written by anomem" in done.err
        assert all((tmp_path / n).read_bytes() == c for n, c in theirs.items())
        theirs = {n: c for n, c in theirs.items() if not n.startswith(name)}
        for _ in range(2):  # the second time it is ours
            assert anomem(*command, "--overwrite").code == 0
        assert anomem(*command).code == 0


def test_outputs_that_are_no_files(anomem: Command, finished: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "file").write_text("")
    for name in ("folder.csv", "pipe.csv", "file/scores.csv", "x" * 300 + ".csv"):
        output = tmp_path / name
        done = anomem("score", photos, "--run", finished, "--output", output, "--overwrite")
        assert (done.code, done.out) == (2, "")
        assert len(done.err.splitlines()) == 1, done.err


def test_the_files_of_a_run_are_kept(anomem: Command, finished: Path, photos: Path) -> None:
    before = contents(finished)
    for options in ((), ("--overwrite",)):
        done = anomem("score", photos, "--run", finished, "--output", finished / "config.json", *options)
        assert (done.code, "is an input" in done.err) == (2, True)
    assert contents(finished) == before


def test_an_output_in_a_new_folder(anomem: Command, finished: Path, photos: Path, tmp_path: Path) -> None:
    assert anomem("score", photos, "--run", finished, "--output", tmp_path / "new" / "scores.csv").code == 0
    assert (tmp_path / "new" / "scores.csv").exists()


def test_a_run_does_not_go_into_a_folder_of_other_files(
    anomem: Command, tiny: list[str], photos: Path, tmp_path: Path
) -> None:
    (photos / "log.jsonl").write_text("mine\n")
    before = contents(photos)
    done = anomem("train", *tiny, "--run.directory", photos)
    assert (done.code, "holds other files" in done.err) == (2, True)
    assert contents(photos) == before


@pytest.mark.parametrize(
    ("command", "name"), [("evaluate", "scores.csv"), ("evaluate", "metrics.json"), ("plot", "figures/roc.png")]
)
def test_files_of_the_user_in_a_run(anomem: Command, finished: Path, tmp_path: Path, command: str, name: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("figures", "scores*", "metrics*"))
    (run / "figures").mkdir()
    (run / name).write_bytes(b"mine")
    done = anomem(command, run)
    assert (done.code, "exists and was not written by anomem" in done.err) == (2, True)
    assert (run / name).read_bytes() == b"mine"


def test_figures_of_ours_are_drawn_again(tmp_path: Path) -> None:
    from anomem.plots import loss_curves
    from anomem.plots.style import is_figure

    loss_curves([{"step": 1, "loss": 1.0}], tmp_path / "loss.png")
    assert is_figure(tmp_path / "loss.png")
    assert not is_figure(picture(tmp_path / "mine.png"))


# Nothing outside.


def test_maps_stay_in_their_folder(
    anomem: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "in" / "sub" / "a.png")
    picture(tmp_path / "in" / "other" / "b.png")
    monkeypatch.chdir(tmp_path / "in")
    done = anomem("score", "sub/a.png", "sub/../other/b.png", "--run", finished, "--maps", tmp_path / "out" / "maps")
    assert done.code == 0, done.err
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tiff")}
    assert written == {"out/maps/sub/a.tiff", "out/maps/other/b.tiff"}


def test_maps_do_not_follow_links_out(anomem: Command, finished: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "in" / name / "x.png")
    (tmp_path / "maps").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "maps" / "a").symlink_to(tmp_path / "elsewhere")
    done = anomem("score", *(tmp_path / "in" / n for n in "ab"), "--run", finished, "--maps", tmp_path / "maps")
    assert (done.code, "leads out of" in done.err) == (2, True)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", "a/b", "x" * 400])
def test_a_run_of_any_data_set_stays_in_runs(name: str) -> None:
    path = default_directory(TrainConfig(data=DataConfig(name, normal="../x")))
    assert Path(path).parent == Path("runs")
    assert ".." not in path
    assert len(Path(path).name) < 200


def test_tensors_of_another_place_are_not_read(anomem: Command, finished: Path, photos: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    note = json.loads((run / "checkpoints" / "scorer.json").read_text())
    shutil.copy(run / "checkpoints" / note["tensors"], tmp_path / "other.safetensors")
    for tensors in ("../../other.safetensors", str(tmp_path / "other.safetensors"), "stage1-00000004.safetensors"):
        (run / "checkpoints" / "scorer.json").write_text(json.dumps({**note, "tensors": tensors}))
        done = anomem("score", photos, "--run", run)
        assert (done.code, "not beside it" in done.err) == (2, True), done.err


def test_a_million_threads(anomem: Command, tmp_path: Path) -> None:
    done = anomem("train", "--run.threads=1000000", "--run.directory", tmp_path / "run")
    assert (done.code, "`run.threads`: expected at most 1024" in done.err) == (2, True)


# One bad file among many.


@pytest.fixture
def mixed(photos: Path) -> Path:
    """The three images and three files that cannot be read."""
    (photos / "bad.png").write_bytes(b"\x89PNG no more")
    (photos / "empty.jpg").write_bytes(b"")
    os.mkfifo(photos / "pipe.png")
    return photos


@pytest.mark.timeout(120)
@pytest.mark.parametrize("suffix", [None, "csv", "json"])
def test_bad_files_do_not_stop_the_others(
    anomem: Command, finished: Path, mixed: Path, tmp_path: Path, suffix: str | None
) -> None:
    output = tmp_path / f"scores.{suffix}"
    options = () if suffix is None else ("--output", output)
    done = anomem("score", mixed, mixed / "missing.png", "--run", finished, "--maps", tmp_path / "maps", *options)
    assert done.code == 1
    named = done.err.splitlines()
    for name in ("bad.png", "empty.jpg", "pipe.png", "missing.png"):
        assert sum(name in line for line in named) == 1, done.err
    assert named[-1] == "anomem: 3 images were scored; failures: 4"
    assert f"anomem: {mixed / 'missing.png'}: cannot read it: No such file or directory" in named
    if suffix is None:
        paths = [line.split("\t")[1] for line in done.out.splitlines()]
    else:
        rows = json.loads(output.read_text()) if suffix == "json" else csv.DictReader(output.open())
        paths = [row["path"] for row in rows]
    assert [Path(path).name for path in paths] == ["0.png", "1.tiff", "2.bmp"]
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"0.tiff", "1.tiff", "2.tiff"}


def test_scores_that_are_not_finite_are_no_scores(
    anomem: Command, finished: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fault of a device would give them: of the second image of three."""
    forward = Scorer.forward

    def spoiled(self: Scorer, images: torch.Tensor) -> Scored:
        found = forward(self, images)
        found.scores["plain"][1] = float("nan")
        return found

    monkeypatch.setattr(Scorer, "forward", spoiled)
    files = [mixed / name for name in ("0.png", "1.tiff", "2.bmp")]
    done = anomem("score", *files, "--run", finished, "--output", tmp_path / "s.json")
    assert done.code == 1
    assert done.err.splitlines()[0] == f"anomem: {files[1]}: its score plain is not finite"
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [row["path"] for row in rows] == [str(files[0]), str(files[2])]
    refused = anomem("evaluate", finished, "--no-baselines")
    assert refused.code == 2
    assert "`scores['plain']`: expected finite numbers" in refused.err


def test_images_of_16_bits_that_use_few_of_them(anomem: Command, finished: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 900, np.uint16)).save(tmp_path / "x.png")
    done = anomem("score", tmp_path, "--run", finished)
    assert done.code == 0
    assert "value is 900 of 65535 keep 4 of 256 levels of grey: set their range, --data.levels 0 1023" in done.err


def test_scores_do_not_depend_on_bad_files(anomem: Command, finished: Path, mixed: Path) -> None:
    alone = anomem("score", *(mixed / name for name in ("0.png", "1.tiff", "2.bmp")), "--run", finished)
    assert anomem("score", mixed, "--run", finished).out == alone.out


def test_no_image_that_can_be_scored(anomem: Command, finished: Path, mixed: Path, tmp_path: Path) -> None:
    done = anomem("score", mixed / "bad.png", mixed / "empty.jpg", "--run", finished, "--output", tmp_path / "s.csv")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == "anomem: none of the images could be scored"
    assert not (tmp_path / "s.csv").exists()


# Streams.


def test_an_image_on_standard_input(
    anomem: Command, finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = anomem("score", photos / "0.png", "--run", finished).out.split("\t")[0]
    for content, code in (((photos / "0.png").read_bytes(), 0), (b"\x89PNG no more", 2), (b"", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        done = anomem("score", "-", "--run", finished, "--maps", tmp_path / "maps")
        assert done.code == code, done.err
        assert done.out == (f"{expected}\t-\n" if code == 0 else "")
        assert str(tmp_path) not in done.err
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["stdin.tiff"]


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_names_on_standard_input(
    anomem: Command, finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, separator: bytes
) -> None:
    odd = picture(photos / "BMW.png")
    shutil.copy(odd, photos / ODD)
    names = [photos / name for name in ("BMW.png", ODD, "missing.png", "2.bmp")]
    content = separator.join(map(os.fsencode, names)) + separator
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    done = anomem("score", "-", "--run", finished)
    assert (done.code, "missing.png" in done.err) == (1, True)
    assert [Path(line.split("\t")[1]).name for line in done.out.splitlines()] == [
        "BMW.png",
        "caf\\udce9 \\udcff.png",
        "2.bmp",
    ]


def test_a_pipe_of_the_shell(anomem: Command, finished: Path, photos: Path) -> None:
    read, write = os.pipe()
    os.write(write, (photos / "0.png").read_bytes())
    os.close(write)
    done = anomem("score", f"/dev/fd/{read}", photos / "2.bmp", "--run", finished)
    os.close(read)
    assert done.code == 0, done.err
    assert [line.split("\t")[1] for line in done.out.splitlines()] == [f"/dev/fd/{read}", str(photos / "2.bmp")]


# Names and terminals of any kind.


@pytest.mark.parametrize("name", [ODD, "two\nlines.png", "tab\t.png", "\x1b[31mred.png", "größe 漢字.png", "[red].png"])
def test_names_of_any_kind(anomem: Command, finished: Path, photos: Path, tmp_path: Path, name: str) -> None:
    picture(photos / name)
    done = anomem("score", photos, "--run", finished)
    assert (done.code, len(done.out.splitlines())) == (0, 4), done.err
    assert "\x1b" not in done.out
    for suffix in ("csv", "json"):
        output = tmp_path / f"scores.{suffix}"
        assert anomem("score", photos, "--run", finished, "--output", output).code == 0
        text = output.read_text(encoding="utf-8")
        if suffix == "json":
            assert str(photos / name) in [row["path"] for row in json.loads(text)]
        else:
            assert len(list(csv.DictReader(io.StringIO(text, newline="")))) == 4


def test_names_of_any_kind_are_trained_on_and_measured(anomem: Command, tmp_path: Path) -> None:
    kind = os.fsdecode(b"$x$ [red] \xff")
    for part, count in (("train/good", 4), ("test/good", 3), (f"test/{kind}", 3)):
        for i in range(count):
            picture(tmp_path / kind / part / f"{i} {ODD}", i)
    run = tmp_path / os.fsdecode(b"r\xe9")
    small = ("--model.backbone=small", "--data.image-size=16", "--data.grey", "--optimizer.steps=2")
    rest = ("--optimizer.warmup=0", "--run.device=cpu", "--score.copies=0", "--loss.max-positions=2")
    done = anomem("train", "--data.root", tmp_path / kind, "--run.directory", run, *small, *rest)
    assert done.code == 0, done.err
    for command in ("evaluate", "plot"):
        done = anomem(command, run)
        assert done.code == 0, done.err
    rows = list(csv.DictReader((run / "scores.csv").open(encoding="utf-8")))
    assert len(rows) == 6


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_terminals_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "OMP_NUM_THREADS": "1"}
    done = process("train", "--help", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    picture(tmp_path / "漢字" / "train" / "good" / "x.png")
    done = process("train", "--data.root", tmp_path / "漢字", env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(b"anomem: \\u6f22\\u5b57 good: expected at least two"), done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output(finished: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "anomem", "score", str(photos), "--run", str(finished)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert done.stderr.splitlines()[-1] == "anomem: cannot write to standard output: No space left on device"


def test_warnings_are_one_line(anomem: Command, tmp_path: Path) -> None:
    for i in range(2):
        Image.new("L", (16, 16), 7 + i).save(picture(tmp_path / "train" / "good" / f"{i}.png"))
    (tmp_path / "run" / "mine").mkdir(parents=True)  # so that the command ends before the training
    small = ("--model.backbone=small", "--data.image-size=16")
    done = anomem("train", "--data.root", tmp_path, *small, "--run.directory", tmp_path / "run")
    assert done.code == 2
    (warning,) = (line for line in done.err.splitlines() if "nearly constant" in line)
    assert warning.startswith("anomem: warning: ")


# The first minutes.


def test_the_version_is_printed_at_once() -> None:
    code = "import sys; from anomem.cli import main; main(['--version']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "anomem")


def test_a_root_without_a_preset_means_a_folder(anomem: Command, tmp_path: Path) -> None:
    picture(tmp_path / "train" / "good" / "x.png")
    done = anomem("train", "--data.root", tmp_path, "--run.directory", tmp_path / "run")
    assert (done.code, "good: expected at least two normal training images, found 1" in done.err) == (2, True)
    for options in (("--preset=digits",), ("--data.dataset=textures",)):
        done = anomem("train", *options, "--data.root", tmp_path, "--run.directory", tmp_path / "run")
        assert (done.code, "`--data.root`: the data set" in done.err) == (2, True), done.err
    assert preset("folder").data.normal == ""


def test_levels_are_those_of_the_run(anomem: Command, tmp_path: Path) -> None:
    """Twelve bits in files of sixteen: a defect of 40 levels is seen."""
    source = np.random.default_rng(0)

    def camera(path: Path, defect: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(1000, 1100, (16, 16)).astype(np.uint16)
        pixels[4:12, 4:12] += 900 * defect
        Image.fromarray(pixels).save(path)

    for part, count in (("train/good", 8), ("test/good", 4), ("test/cut", 4)):
        for i in range(count):
            camera(tmp_path / part / f"{i}.png", part == "test/cut")
    run = tmp_path / "run"
    small = ("--model.backbone=small", "--data.image-size=16", "--data.grey", "--optimizer.steps=2")
    rest = ("--optimizer.warmup=0", "--run.device=cpu", "--score.copies=0", "--loss.max-positions=2")
    levels = ("--data.levels", "500", "2500")
    done = anomem("train", "--data.root", tmp_path, "--run.directory", run, *small, *rest, *levels)
    assert done.code == 0, done.err
    evaluated = anomem("evaluate", run, "--no-baselines")
    assert evaluated.code == 0, evaluated.err
    rows = {row["path"]: float(row["detector"]) for row in csv.DictReader((run / "scores.csv").open())}
    scored = anomem("score", tmp_path / "test" / "cut", "--run", run)
    found = [line.split("\t") for line in scored.out.splitlines()]
    assert [float(value) for value, _ in found] == pytest.approx([rows[path] for _, path in found], rel=1e-4)
    assert not scored.err
    truth = torch.tensor(["cut" in path for path in rows])
    values = torch.tensor(list(rows.values()))
    assert float(values[truth].min()) > float(values[~truth].max())


def test_a_split_is_kept_in_the_run(anomem: Command, tmp_path: Path) -> None:
    for part, count in (("train/good", 6), ("test/good", 4), ("test/cut", 6)):
        for i in range(count):
            picture(tmp_path / part / f"{i}.png", i)
    run = tmp_path / "run"
    small = ("--model.backbone=small", "--data.image-size=16", "--data.grey", "--optimizer.steps=2")
    rest = ("--optimizer.warmup=0", "--run.device=cpu", "--score.copies=0", "--loss.max-positions=2")
    stage2 = ("--data.outlier-ratio=0.5", "--stage2.no-enabled")
    done = anomem("train", "--data.root", tmp_path, "--run.directory", run, *small, *rest, *stage2)
    assert done.code == 0, done.err
    kept = json.loads((run / "split.json").read_text())
    assert len(kept["anomalous"]) == 3
    for i in range(5):
        picture(tmp_path / "test" / "cut" / f"{i}0.png", i)
    picture(tmp_path / "train" / "good" / "new.png", 9)
    done = anomem("evaluate", run, "--no-baselines")
    assert done.code == 0, done.err
    assert "1 images were added since the run began" in done.err
    tested = {row["path"] for row in csv.DictReader((run / "scores.csv").open())}
    assert not tested & {str(tmp_path / name) for name in kept["anomalous"]}
    assert len(tested) == 4 + 6 + 5 - 3
    (run / "split.json").write_text("[]")
    done = anomem("evaluate", run)
    assert (done.code, "split.json is damaged" in done.err) == (2, True)
