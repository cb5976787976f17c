"""Without a step the encoder stays as it is, the memories are filled from all normals, and the run scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anomem.data import load_task
from anomem.errors import ArgumentError
from anomem.models import NetworkEncoder
from anomem.plots.run import draw_figures
from anomem.reference.retrieve import normalize_rows
from anomem.scoring import score_images
from anomem.train import RunConfig, load_run, load_scorer, preset, train, train_task
from anomem.train.run import model_for


def test_no_steps_fill_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("digits")
    config = replace(
        config,
        model=replace(config.model, prototypes=(16,)),
        optimizer=replace(config.optimizer, steps=0),
        run=RunConfig(directory=str(tmp_path / "run"), device="cpu"),
    )
    task = load_task(config.data)
    fresh = model_for(config, task)
    run = train(config, quiet=True)
    scorer = load_scorer(run)
    weights = scorer.model.encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in fresh.encoder.state_dict().items())
    # the centres are nearer to the normals' features than random rows of N(0, 1) are
    batch, _ = next(iter(task.train.batches(torch.arange(64), 64)))
    queries = fresh.eval().queries(fresh(batch))
    for query, filled, start in zip(queries, scorer.model.memories, fresh.memories, strict=True):
        rows = normalize_rows(query.flatten(0, 1), filled.normalize)
        assert torch.cdist(rows, filled.prototypes).amin(1).mean() < torch.cdist(rows, start.prototypes).amin(1).mean()
    assert score_images(scorer, task.test).scores["detector"].shape == (len(task.test),)
    for costly in ("tsne", "prototypes", "extremes", "roc_curves"):
        monkeypatch.setattr(f"anomem.plots.run.{costly}", lambda *_, **__: None)
    monkeypatch.setattr("anomem.plots.run.baselines", lambda *_: {})
    opened, _, loaded, again = load_run(run)
    drawn = draw_figures(opened.rows(), loaded, again, opened.figures)
    assert "loss" not in {path.stem for path in drawn}


def test_fewer_features_than_prototypes_are_told() -> None:
    config = preset("digits")
    config = replace(config, optimizer=replace(config.optimizer, steps=0))
    config = replace(config, model=replace(config.model, prototypes=(4096,)))
    task = load_task(config.data)
    with pytest.raises(ArgumentError, match=r"model\.prototypes.*at most \d+, the features of normals at scale"):
        train_task(config, task, model_for(config, task), quiet=True)


def test_a_frozen_network_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 4, 4), torch.nn.BatchNorm2d(8))

    class Maps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.body(x)]

    config = preset("digits")
    config = replace(config, optimizer=replace(config.optimizer, steps=0))
    task = load_task(config.data)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train_task(config, task, model_for(config, task, NetworkEncoder(Maps(), (16, 16), 1, freeze=True)), quiet=True)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
