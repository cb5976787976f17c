"""The pieces that should matter do: a small real run detects, and the same run with one piece wrong does not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from anomem.data import Task, load_task
from anomem.evaluate.metrics import auroc
from anomem.scoring import Scorer, score_images
from anomem.train import TrainConfig, model_for, preset, train_stage2, train_task
from anomem.train.run import head_for

DETECTS, FAILS = 0.9, 0.7


class Run(NamedTuple):
    """A run with labelled anomalies on digit 3."""

    config: TrainConfig
    task: Task
    scorer: Scorer


@pytest.fixture(scope="module")
def run() -> Run:
    config = preset("digits")
    config = replace(
        config,
        data=replace(config.data, outlier_ratio=0.5),
        optimizer=replace(config.optimizer, steps=40),
        stage2=replace(config.stage2, optimizer=replace(config.stage2.optimizer, steps=40)),
        score=replace(config.score, copies=1),
        run=replace(config.run, device="cpu"),
    )
    task = load_task(config.data)
    return Run(config, task, train_task(config, task, model_for(config, task), quiet=True))


def areas(run: Run, scorer: Scorer | None = None) -> dict[str, float]:
    """AUROC of every score."""
    scores = score_images(scorer or run.scorer, run.task.test).scores
    return {name: auroc(values, run.task.test_is_anomaly) for name, values in scores.items()}


@pytest.mark.parametrize("score", ["plain", "prior", "energy", "detector", "stage2"])
def test_the_intact_run_detects(run: Run, score: str) -> None:
    assert areas(run)[score] > DETECTS


def test_a_sign_flip_fails(run: Run) -> None:
    for values in score_images(run.scorer, run.task.test).scores.values():
        assert auroc(-values, run.task.test_is_anomaly) < FAILS


def test_labels_the_wrong_way_round_fail(run: Run) -> None:
    head = head_for(run.config, run.scorer.model)
    train_stage2(run.scorer.model, head, run.task.train, ~run.task.train_is_normal, run.config, quiet=True)
    wrong = copy.deepcopy(run.scorer)
    wrong.head = head
    assert areas(run, wrong)["stage2"] < FAILS


@pytest.mark.parametrize("score", ["plain", "prior", "energy"])
def test_a_shuffled_memory_fails(run: Run, score: str) -> None:
    """The scores that compare with the memory need its features in their places.

    The detector and stage 2 do not: what they see is z minus something, and the features z alone tell digits apart.
    """
    wrong = copy.deepcopy(run.scorer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for memory in wrong.model.memories:
            order = torch.randperm(memory.prototypes.shape[1], generator=generator)
            memory.prototypes.copy_(memory.prototypes[:, order].clone())
    assert areas(run, wrong)[score] < FAILS
