"""The report of a run where a measure is not defined, and what its rows mean."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anomem.augment import AugmentConfig
from anomem.cli.commands import metrics_table
from anomem.data import DataConfig, ResidentImages, Task, load_task
from anomem.errors import UserError
from anomem.evaluate.baselines import require_packages
from anomem.evaluate.report import explained, report, undefined_measures
from anomem.models import ModelConfig, build_model
from anomem.plots import run as figures
from anomem.scoring import ScoreConfig, Scorer, fit_scorer


@pytest.fixture(scope="module")
def task() -> Task:
    """Forty test images of digits, half of them anomalous."""
    whole = load_task(DataConfig(normal="3"))
    rows = torch.cat([where.nonzero().flatten()[:20] for where in (whole.test_is_anomaly, ~whole.test_is_anomaly)])
    assert isinstance(whole.test, ResidentImages)
    return replace(
        whole,
        test=ResidentImages(whole.test.images[rows]),
        test_is_anomaly=whole.test_is_anomaly[rows],
        test_kinds=tuple(whole.test_kinds[i] for i in rows.tolist()),
    )


@pytest.fixture(scope="module")
def scorer(task: Task) -> Scorer:
    model = build_model(ModelConfig(prototypes=(4,)), task.train.size, 1, task.mean, task.std)
    config = ScoreConfig(copies=0)
    return fit_scorer(model, task.train, task.train_is_normal, aligned=True, augment=AugmentConfig(), config=config)


def masks(task: Task, value: bool) -> torch.Tensor:
    return torch.full((len(task.test), *task.test.size), value)


def one_class(task: Task, anomalous: bool) -> Task:
    return replace(task, test_is_anomaly=torch.full_like(task.test_is_anomaly, anomalous))


@pytest.mark.parametrize("anomalous", [True, False])
def test_one_class_gives_what_can_be_measured(task: Task, scorer: Scorer, anomalous: bool) -> None:
    half = masks(task, True)
    half[:, 5:] = False
    only = replace(one_class(task, anomalous), test_masks=half if anomalous else None)
    metrics = report(scorer, only, AugmentConfig(), with_baselines=False)
    word = "anomalous" if anomalous else "normal"
    reason = f"all 40 test images are {word}"
    assert [metrics["missing"][name] for name in ("auroc", "average_precision", "fpr_at_95_tpr")] == [reason] * 3
    assert ({"pixel_auroc", "aupro"} <= metrics["scores"]["detector"].keys()) == anomalous
    json.dumps(metrics, allow_nan=False)
    assert any(reason in line and "auroc" in line for line in explained(metrics))
    assert metrics_table(metrics).row_count > 5


@pytest.mark.parametrize(
    ("value", "reason"),
    [(False, "no mask has an anomalous pixel"), (True, "no mask has a normal pixel"), (None, "there are no masks")],
)
def test_masks_without_pixels_leave_the_other_measures(
    task: Task, scorer: Scorer, value: bool | None, reason: str
) -> None:
    masked = replace(task, test_masks=None if value is None else masks(task, value))
    metrics = report(scorer, masked, AugmentConfig(), with_baselines=False)
    assert metrics["missing"] == {"pixel_auroc": reason, "aupro": reason}
    assert metrics["scores"]["detector"].keys() == {"auroc", "average_precision", "fpr_at_95_tpr"}
    assert explained(metrics)[-1] == f"not measured: pixel_auroc, aupro: {reason}"
    assert [column.header for column in metrics_table(metrics).columns] == ["score", "AUROC", "AP", "FPR@95%TPR"]


def test_a_missing_package_costs_one_measure(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    half = masks(task, True)
    half[:, 5:] = False
    assert undefined_measures(replace(task, test_masks=half)) == {}
    find = importlib.util.find_spec
    hidden: Any = lambda name: None if name == "skimage" else find(name)  # noqa: E731
    monkeypatch.setattr(sys.modules["anomem.evaluate.report"], "find_spec", hidden)
    assert "scikit-image" in undefined_measures(replace(task, test_masks=half))["aupro"]


def test_every_row_is_explained_and_the_default_score_comes_first(task: Task, scorer: Scorer) -> None:
    metrics = report(scorer, task, AugmentConfig(), with_baselines=False)
    lines = explained(metrics)
    for name in metrics["scores"]:
        start = "plain/DISTANCE-POOL" if name.startswith("plain/") else name
        assert any(line.startswith(f"{start}: ") for line in lines), name
    assert sum("what `anomem score` prints" in line for line in lines) == 1
    cells = list(metrics_table(metrics).columns[0].cells)
    assert cells[0] == "detector"
    assert all(cell.startswith(("plain/", "detector/")) for cell in cells[4:])


@pytest.mark.parametrize("anomalous", [True, False])
def test_figures_of_one_class_are_those_that_can_be_drawn(
    task: Task, scorer: Scorer, tmp_path: Path, anomalous: bool
) -> None:
    rows = [{"stage": "stage1", "step": 1, "loss": 1.0}]
    drawn = figures.draw_figures(rows, one_class(task, anomalous), scorer, tmp_path)
    assert [path.stem for path in drawn] == ["loss", "histograms", "extremes", "prototypes", "tsne"]
    assert all(path.exists() for path in drawn)


def test_missing_packages_are_noticed_before_the_work(
    task: Task, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="needs the package sklearn"):
        require_packages()

    def work(*_: object) -> None:
        raise AssertionError("worked before it looked")

    monkeypatch.setattr(figures, "score_images", work)
    with pytest.raises(UserError, match="needs the package sklearn"):
        figures.draw_figures([], task, scorer, tmp_path)
