"""Overlap, linear evaluation and the cost of a step, by hand and on planted data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anomem.data import load_task
from anomem.models import AnoMem
from anomem.reproduce import EXPERIMENTS, Scale, measures
from anomem.reproduce.cell import Cell, Work
from anomem.reproduce.protocol import scaled, seconds_per_step
from anomem.train import RunDirectory


def test_overlap_by_hand() -> None:
    def towards(*degrees: float) -> Tensor:
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]

    found = measures.overlap(towards(0, 10), towards(5, 12, 80), towards(90, 95, 30))
    # Normals at 5° and 12° are nearest to a prototype, that at 80° to the anomaly at 90°; the anomaly at 30° is 20°
    # from a prototype and 60° from another anomaly, the other two are each other's neighbours.
    assert found["normals"] == pytest.approx(2 / 3)
    assert found["anomalies"] == pytest.approx(1 / 3)
    assert found["chance"] == pytest.approx(2 / 5)


def work(tmp_path: Path, experiment: str, setting: str, scale: Scale) -> Work:
    """A digits cell of an experiment."""
    cell = Cell(experiment, "digits", "data", setting, "3", 0, scale)
    config = cell.config(EXPERIMENTS[experiment].settings[setting], "cpu")
    task = cell.task(config)
    config = scaled(config, scale, len(task.train))
    config = replace(config, run=replace(config.run, directory=str(tmp_path / "run")))
    return Work(cell, config, task, RunDirectory.create(config, ["task"]), tmp_path / "picture.png")


def test_linear_evaluation_uses_features_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = work(tmp_path, "table6", "untrained", Scale(subset=40))
    whole = load_task(replace(cell.config.data, outlier_ratio=1.0))
    counts: list[int] = []
    planted = torch.Generator().manual_seed(0)

    def features(_: AnoMem, images: object, __: int) -> Tensor:
        counts.append(len(images))  # type: ignore[arg-type]
        labels = is_normal[len(counts) - 1]
        return torch.randn(len(labels), 5, generator=planted, dtype=torch.float64) + 3 * labels[:, None]

    task = measures.scaled_task(whole, cell.cell.scale, 0)
    is_normal = (task.train_is_normal.double(), (~task.test_is_anomaly).double())
    monkeypatch.setattr(measures, "pooled_features", features)
    assert measures.linear_auroc(cell.model(), cell) > 0.99
    assert counts == [80, 80], "as many labelled anomalies as normals; the test images"
    counts.clear()
    is_normal = (is_normal[0], torch.zeros(80, dtype=torch.float64))
    assert measures.linear_auroc(cell.model(), cell) == pytest.approx(0.5, abs=0.15), "nothing to tell them by"


def test_pooled_features_are_means_of_every_scale(tmp_path: Path) -> None:
    cell = work(tmp_path, "table6", "untrained", Scale(subset=8))
    model = cell.model().eval()
    images, _ = next(cell.task.train.batches(torch.arange(8), 8))
    pooled = measures.pooled_features(model, cell.task.train, 3)
    expected = torch.cat([m.double().mean((2, 3)) for m in model(images)], dim=1)
    assert pooled.shape == (8, 16 + 32 + 64)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


def test_labels_in_stage_2_alone_leave_stage_1_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = work(tmp_path, "ablation", "labels in stage 2", Scale(epochs=1, subset=20))
    trained: list[tuple[int, object]] = []
    stage1 = Work.stage1

    def noted(self: Work, images: object, is_normal: Tensor | None) -> AnoMem:
        trained.append((len(images), is_normal))  # type: ignore[arg-type]
        return stage1(self, images, is_normal)  # type: ignore[arg-type]

    monkeypatch.setattr(Work, "stage1", noted)
    found = measures.labels_late(cell)
    assert trained == [(20, None)]
    assert len(cell.task.train) == 22
    assert 0 <= found["stage2"]["auroc"] <= 1


def test_every_margin_is_measured_on_one_stage_1(tmp_path: Path) -> None:
    found = measures.margins(work(tmp_path, "margin", "10% labelled", Scale(epochs=1, subset=20)))
    assert set(found) == set(EXPERIMENTS["margin"].scores)


def test_the_time_of_a_step_is_scaled_to_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = work(tmp_path, "table7", "linear", Scale(subset=40))
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("anomem.reproduce.protocol.train_stage1", lambda *_, **__: None)
    wall, _ = seconds_per_step(cell.config, cell.task, 10)
    assert wall == pytest.approx(1 / 2 * 40 / 10)  # one second for two steps of a quarter of the batch
