"""The command line of fitted detectors: fit, score with verdicts, evaluate against rivals, plot."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomem.cli import main
from anomem.evaluate.fitted import join_maps
from anomem.scoring import benjamini_hochberg
from anomem.train import load_detector
from tests.cli.conftest import Outcome
from tests.train.test_fitting import parts, write

Command = Callable[..., Outcome]
OPTIONS = (
    "--encoder=efficientnet_lite0", "--weights=none", "--data.image-size=64", "--run.device=cpu", "--alpha=0.1",
    "--scales", "block3", "block5", "--fill.prototypes", "32",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "parts"
    write(root / "good", parts(20))
    write(root / "test" / "good", parts(12, 1))
    write(root / "test" / "spot", parts(12, 2, defect=True))
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "run"
    assert main(["fit", str(photos), *OPTIONS, "--run.directory", str(path), "--quiet"]) == 0
    return path


def test_fit_says_what_it_chose(anomem: Command, photos: Path, tmp_path: Path) -> None:
    done = anomem("fit", photos, *OPTIONS, "--run.directory", tmp_path / "run")
    assert done.code == 0, done.err
    for line in ("20 normal images at 64×64", "encoder: efficientnet_lite0, frozen", "kmeans", "score: both",
                 "too few normals", "cross-fitted: no proof", "images/s", "next: anomem score --run"):  # fmt: skip
        assert line in done.out, line


def test_score_prints_verdicts(anomem: Command, run: Path, photos: Path, tmp_path: Path) -> None:
    done = anomem("score", photos / "test" / "spot", "--run", run)
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [row[2] for row in rows] == ["anomalous"] * 12
    assert all(float(row[1]) == pytest.approx(1 / 21, rel=1e-5) for row in rows)
    # Another rate, without a new fit.
    strict = anomem("score", photos / "test" / "good", "--run", run, "--alpha", "0.9")
    assert "anomalous" in strict.out
    table = tmp_path / "scores.csv"
    maps = tmp_path / "maps"
    done = anomem("score", photos / "test" / "spot", "--run", run, "--output", table, "--maps", maps)
    assert done.code == 0, done.err
    written = list(csv.DictReader(table.open()))
    assert {"both", "plain", "local", "p_value", "verdict"} <= written[0].keys()
    assert {row["verdict"] for row in written} == {"anomalous"}
    with Image.open(maps / "00.tiff") as image:
        assert image.size == (64, 64)


def test_an_alpha_that_cannot_be_promised(anomem: Command, run: Path, photos: Path, tmp_path: Path) -> None:
    picture = photos / "test" / "good" / "00.png"
    done = anomem("score", picture, "--run", run, "--alpha", "0.01")
    assert (done.code, "0.01 needs 99 normals" in done.err) == (2, True)
    done = anomem("score", picture, "--run", run, "--alpha", "2")
    assert (done.code, "between 0 and 1" in done.err) == (2, True)
    # Its own alpha is out of reach: scores and p-values, no verdict, and a sentence that says so.
    few = tmp_path / "few"
    assert anomem("fit", photos, *OPTIONS[:-6], *OPTIONS[-5:], "--alpha=0.01", "--run.directory", few).code == 0
    done = anomem("score", picture, "--run", few)
    assert done.code == 0
    assert done.out.split("\t")[2] == "-"
    assert "no verdicts: 20 calibration normals cannot promise" in done.err


def test_false_discovery_rate_over_all_images(anomem: Command, run: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    done = anomem("score", photos / "test" / "spot", photos / "test" / "good", "--run", run, "--fdr", "0.1",
                  "--output", table)  # fmt: skip
    assert done.code == 0, done.err
    assert "can call either none or at least 12 of 24 images anomalous" in done.err
    rows = list(csv.DictReader(table.open()))
    p_values = torch.tensor([float(row["p_value"]) for row in rows])
    expected = benjamini_hochberg(p_values, 0.1)
    assert [row["verdict"] == "anomalous" for row in rows] == expected.tolist()
    assert int(expected.sum()) >= 12
    printed = anomem("score", photos / "test" / "spot" / "00.png", "--run", run, "--fdr", "0.01")
    assert "can call none of 1 images" in printed.err
    assert printed.out.split("\t")[2] == "normal"


def test_pixel_threshold_is_told_with_the_maps(anomem: Command, run: Path, photos: Path, tmp_path: Path) -> None:
    done = anomem("score", photos / "test" / "spot" / "00.png", "--run", run, "--maps", tmp_path / "maps")
    (told,) = re.findall(r"maps above ([\d.]+) are anomalous pixels: about 10.00%", done.err)
    detector = load_detector(run)
    assert float(told) == pytest.approx(detector.calibration.pixel_threshold("local", 0.1), rel=1e-4)
    with Image.open(tmp_path / "maps" / "00.tiff") as image:
        above = torch.from_numpy(np.array(image)) > float(told)
    assert bool(above[8:24, 40:56].any())
    assert not bool(above[40:].any())


def test_letterboxed_maps_lie_on_their_image(anomem: Command, tmp_path: Path) -> None:
    wide = torch.cat([parts(6), parts(6, 5)], dim=3)
    write(tmp_path / "good", wide)
    bad = wide[:1].clone()
    bad[:, :, 4:20, 100:120] = 255
    write(tmp_path / "bad", bad)
    options = (*OPTIONS, "--data.letterbox", "--run.directory", tmp_path / "run")
    assert anomem("fit", tmp_path / "good", *options).code == 0
    done = anomem("score", tmp_path / "bad", "--run", tmp_path / "run", "--maps", tmp_path / "maps")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "maps" / "00.tiff") as image:
        found = torch.from_numpy(np.array(image))
    assert found.shape == (64, 128)
    peak = int(found.argmax())
    assert 0 <= peak // 128 < 28
    assert 92 <= peak % 128 < 128


def test_evaluate_and_plot(anomem: Command, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    done = anomem("evaluate", copy)
    assert done.code == 0, done.err
    metrics = json.loads((copy / "metrics.json").read_text())
    assert metrics["scores"]["both"]["auroc"] > 0.95
    assert set(metrics["same_encoder"]) == {
        "PatchCore, max", "PatchCore, top tenth", "PaDiM, max", "PaDiM, top tenth",
    }  # fmt: skip
    assert set(metrics["baselines"]) == {"kNN-3", "PCA-64 residual", "brightness"}
    assert metrics["verdict"]["found"] == 12
    for text in ("promised: about 10.00%", "12 of 12 anomalies found", "same encoder: PaDiM, max", "pixels: kNN-3"):
        assert text in done.out, text
    drawn = anomem("plot", copy)
    assert [Path(line).stem for line in drawn.out.splitlines()] == ["histograms", "roc", "extremes"]
    refused = anomem("evaluate", copy, "--controls", "untrained")
    assert (refused.code, "was not trained" in refused.err) == (2, True)


def test_mistakes_are_one_sentence(anomem: Command, run: Path, finished: Path, photos: Path, tmp_path: Path) -> None:
    picture = photos / "test" / "good" / "00.png"
    damaged, endless = tmp_path / "damaged", tmp_path / "endless"
    (tmp_path / "empty").mkdir()
    for copy in (damaged, endless):
        shutil.copytree(run, copy)
    next(damaged.rglob("*.safetensors")).write_bytes(b"")
    settings = json.loads((run / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps({**settings, "alpha": 10**400}))
    for arguments, sentence in (
        (("score", picture, "--run", damaged), "was written with); fit anew, into another directory"),
        (("score", picture, "--run", endless), "`alpha`: expected float, received 1000"),
        (("fit",), "expected a folder of good images"),
        (("fit", tmp_path / "empty"), "expected folders of images"),
        (("fit", tmp_path / "none"), "expected a folder of images at"),
        (("fit", picture), "which is a file"),
        (("fit", photos, "--run.directory", picture), "it is no folder"),
        (("fit", photos, "--data.dataset", "digits"), "reads no folder"),
        (("fit", photos, "--data.root", photos), "`--data.root`: the folder is"),
        (("fit", photos, "--run.directory", run), "already holds a run"),
        (("fit", photos, "--alpha", "0"), "between 0 and 1"),
        (("fit", photos, "--encoder", "resnet_of_nobody"), "one of torchvision's"),
        (("fit", photos, *OPTIONS[:1], "--weights", tmp_path / "none.pth"), "there is no file of weights"),
        (("train", "--resume", run), "holds a fitted detector"),
        (("score", picture, "--run", run, "--by", "energy"), "expected one of plain"),
        (("score", picture, "--run", finished, "--alpha", "0.1"), "is not calibrated"),
        (("score", picture, "--run", finished, "--fdr", "0.1"), "is not calibrated"),
        (("score", picture, "--run", run, "--fdr", "1"), "between 0 and 1"),
        (("score", picture, "--run", run, "--fdr", "0.1", "--alpha", "0.1"), "received both"),
        (("fit", photos, *OPTIONS, "--calibration", photos / "good"), "20 of 20 that equal fitted ones"),
        (("fit", photos, *OPTIONS, "--calibration", tmp_path / "none"), "create it or correct `calibration`"),
        (("fit", photos, *OPTIONS, "--labels", tmp_path / "none"), "create it or correct `labels`"),
        (("fit", photos, *OPTIONS, "--data.normal", "bolts"), "`data.normal`: expected good, the only folder"),
        (("fit", photos, *OPTIONS[:2], *OPTIONS[3:], "--data.image-size", "64", "96", "--tile", "128"), "at most 64"),
        (("fit", photos, *OPTIONS[:2], *OPTIONS[3:], "--tile", "64"), "height and width"),
        (("fit", photos, *OPTIONS[:5], "--scales", "nope"), "or a stride of"),
        (("fit", photos, *OPTIONS, "--fill.prototypes", "0"), "fill.prototypes"),
    ):
        done = anomem(*arguments)
        assert (done.code, done.err.count("\n")) == (2, 1), (arguments, done.err)
        assert sentence in done.err, done.err


def test_joined_maps_lie_at_the_finest_positions() -> None:
    joined = join_maps([torch.ones(2, 16, 3), 2 * torch.ones(2, 4, 5)], [(4, 4), (2, 2)])
    assert joined.shape == (2, 16, 8)
    assert torch.equal(joined[..., 3:], 2 * torch.ones(2, 16, 5))
