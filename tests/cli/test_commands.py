"""What the commands do when all is well."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from anomem.cli.commands import Train
from anomem.cli.main import _parse
from anomem.data import ImageFiles
from anomem.evaluate import auroc
from anomem.train.config import Preset, preset
from anomem.train.run import load_run, load_scorer

Command = Callable[..., Any]


def without_times(run: Path) -> list[dict[str, Any]]:
    """The log of a run, but for what a clock says."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


@pytest.fixture(scope="module")
def pictures(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five test images of the finished run as PNG files."""
    _, _, task, _ = load_run(finished)
    folder = tmp_path_factory.mktemp("pictures")
    images, _ = next(iter(task.test.batches(torch.arange(5), 5)))
    paths = [folder / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[0].numpy()).save(path)
    return paths


def test_help_and_version(anomem: Command) -> None:
    commands = re.search(r"\{(fit,[a-z,]+)\}", anomem("--help").out)
    assert commands is not None
    for command in commands[1].split(","):
        done = anomem(command, "--help")
        assert done.code == 0
        assert f"usage: anomem {command}" in done.out
    assert anomem("--version").out.startswith("anomem ")


@pytest.mark.parametrize("module", ["cli.commands", "cli.elsewhere", "cli.reproduce", "cli.score", "data.config",
                                    "models.config", "augment.config", "train.config", "scoring.config"])  # fmt: skip
def test_an_option_is_explained_in_lines_that_end_where_a_clause_does(module: str) -> None:
    """The help keeps the line ends of an option's docstring, wherever the terminal breaks lines besides."""
    source = Path(importlib.import_module(f"anomem.{module}").__file__ or "").read_text(encoding="utf-8")
    for kind in ast.parse(source).body:
        for one in kind.body if isinstance(kind, ast.ClassDef) else ():
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and one is not kind.body[0]:
                for line in str(one.value.value).splitlines():
                    assert line.endswith((".", ";", ":", "…")), f"{module}.{kind.name}: {line}"


def test_a_run_is_complete(finished: Path) -> None:
    assert json.loads((finished / "config.json").read_text())["optimizer"]["steps"] == 4
    rows = without_times(finished)
    assert [row["step"] for row in rows] == [2, 4]
    assert {"loss", "contrast/block3", "variance/block3", "perplexity/block3", "effective/block3"} <= rows[0].keys()
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "scorer-00000004.safetensors",
        "scorer.json",
        "stage1-00000004.safetensors",
        "stage1.json",
    ]


def test_training_tells_what_it_does_and_what_comes_next(anomem: Command, tiny: list[str], tmp_path: Path) -> None:
    done = anomem("train", *tiny, "--run.directory", tmp_path / "run")
    assert done.code == 0
    assert "digits 3: 128 training images" in done.out
    assert "stage1 4/4  loss" in done.out
    assert f"run written to {tmp_path / 'run'}; next: anomem evaluate" in done.out


def test_a_configuration_is_replayed(anomem: Command, finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = anomem("train", "--config", finished / "config.json", "--run.directory", again, "--quiet")
    assert (done.code, done.out.strip()) == (0, str(again))
    first, second = (json.loads((run / "config.json").read_text()) for run in (finished, again))
    assert second["run"].pop("directory") == str(again)
    del first["run"]["directory"]
    assert first == second
    assert without_times(finished) == without_times(again)


def test_resuming_a_finished_run_changes_nothing(anomem: Command, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert anomem("train", "--resume", finished, "--quiet").code == 0
    assert before == {path: path.read_bytes() for path in before}


def test_evaluate(anomem: Command, finished: Path) -> None:
    done = anomem("evaluate", finished, "--controls", "untrained")
    assert done.code == 0
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"plain", "prior", "energy", "detector", "detector/features"} <= metrics["scores"].keys()
    assert set(metrics["baselines"]) == {"kNN-3", "one-class SVM", "LOF", "isolation forest"}
    assert f"{metrics['scores']['detector']['auroc']:.4f}" in done.out
    assert f"{metrics['controls']['untrained']['plain']['auroc']:.4f}" in done.out
    assert "raw pixels: kNN-3" in done.out
    rows = list(csv.DictReader((finished / "scores.csv").open()))
    assert {"path", "kind", "anomalous", "plain", "detector"} <= rows[0].keys()
    truth = torch.tensor([row["anomalous"] == "1" for row in rows])
    for name in ("plain", "detector"):
        assert auroc(torch.tensor([float(row[name]) for row in rows]), truth) == metrics["scores"][name]["auroc"]


def test_scores_of_files_are_those_of_the_images(anomem: Command, finished: Path, pictures: list[Path]) -> None:
    scorer = load_scorer(finished)
    images = torch.stack([torch.from_numpy(np.array(Image.open(p)))[None] for p in pictures])
    expected = scorer(images).scores
    for by, options in (("detector", ()), ("plain", ("--by", "plain"))):
        done = anomem("score", *pictures, "--run", finished, *options)
        assert done.code == 0
        lines = [line.split("\t") for line in done.out.splitlines()]
        assert [path for _, path in lines] == [str(p) for p in pictures]
        assert [value for value, _ in lines] == [f"{value:.6g}" for value in expected[by].tolist()]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_scores_of_a_folder_as_a_file(
    anomem: Command, finished: Path, pictures: list[Path], tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"scores.{suffix}"
    done = anomem("score", pictures[0].parent, "--run", finished, "--output", output)
    assert (done.code, done.out) == (0, f"5 scores written to {output}\n")
    rows = json.loads(output.read_text()) if suffix == "json" else list(csv.DictReader(output.open()))
    assert [row["path"] for row in rows] == [str(p) for p in pictures]
    names = ["path", "kind", "anomalous", "plain", "prior", "energy", "detector"]
    assert all(list(row) == names for row in rows), "those of evaluate's scores.csv"


def test_maps_lie_as_the_images_do(anomem: Command, finished: Path, pictures: list[Path], tmp_path: Path) -> None:
    for folder, picture in (("a", pictures[0]), ("b", pictures[1])):
        (tmp_path / folder).mkdir()
        with Image.open(picture) as image:
            image.resize((48, 32)).save(tmp_path / folder / "same.png")
    for by, options in (("detector", ()), ("plain", ("--by", "plain"))):
        maps = tmp_path / f"maps of {by}"
        done = anomem("score", tmp_path / "a", tmp_path / "b", "--run", finished, "--maps", maps, *options)
        assert done.code == 0, done.err
        images = ImageFiles([tmp_path / folder / "same.png" for folder in ("a", "b")], 16, grey=True)
        deviation = load_scorer(finished)(torch.stack([images[0], images[1]])).maps[by]  # [2, 16, 16]
        expected = torch.nn.functional.interpolate(deviation[:, None], (32, 48), mode="bilinear")[:, 0]
        for folder, of_image in zip(("a", "b"), expected, strict=True):
            with Image.open(maps / folder / "same.tiff") as written:
                assert torch.equal(torch.from_numpy(np.array(written)), of_image)


def test_a_folder_of_normal_images_is_enough_to_train_and_score(
    anomem: Command, pictures: list[Path], tmp_path: Path
) -> None:
    good = tmp_path / "data" / "train" / "good"
    good.mkdir(parents=True)
    for picture in pictures:
        shutil.copy(picture, good)
    run = tmp_path / "run"
    small = ("--model.backbone=small", "--data.image-size=32", "--optimizer.steps=2", "--optimizer.warmup=0")
    where = (f"--data.root={tmp_path / 'data'}", f"--run.directory={run}", "--run.device=cpu", "--score.copies=0")
    done = anomem("train", "--preset=folder", "--data.normal=good", *small, *where)
    assert (done.code, "0 test images" in done.out) == (0, True), done.err
    scored = anomem("score", good, "--run", run)
    assert (scored.code, len(scored.out.splitlines())) == (0, len(pictures))
    for command in ("evaluate", "plot"):
        refused = anomem(command, run)
        assert refused.code == 2
        assert "no test images" in refused.err
        assert str(tmp_path / "data" / "test") in refused.err


def test_plot(anomem: Command, finished: Path) -> None:
    done = anomem("plot", finished)
    assert done.code == 0
    drawn = [Path(line) for line in done.out.splitlines()]
    assert [path.stem for path in drawn] == ["loss", "histograms", "roc", "extremes", "prototypes", "tsne"]
    for path in drawn:
        with Image.open(path) as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize("name", get_args(Preset))
def test_training_starts_from_the_preset_that_is_named(name: str) -> None:
    command = _parse(["train", "--preset", name])
    assert isinstance(command, Train)
    assert command.settings == preset(name)
