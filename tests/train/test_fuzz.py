"""A fuzz over the configuration: every value works, or gets one sentence before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.data import Task, task_from_dataset
from anomem.errors import UserError
from anomem.models import ModelConfig, build_model
from anomem.scoring import ScoreConfig, Scorer, useless_scores
from anomem.train import TrainConfig, load_scorer, model_for, train
from anomem.train.config import from_dict, to_dict

NUMBERS = (
    -1, 0, 1e-30, 1e-3, 0.5, 1, 1.5, 2, 7, 1e4, 1e30, 1e308, 2**31, 2**63, 10**30, math.nan, math.inf, None, "x", True,
)  # fmt: skip
RANGES: tuple[list[object], ...] = (
    [], [0], [1], [-1], [1e-30, 1e-30], [1e-9, 1], [0.5, 2], [1, 1], [1, 1e30], [math.nan, 1], ["x"], [2**62],
    [1, 2, 3],
)  # fmt: skip
WORDS = ("", "x", "auto", "none", "l2", "max", "topk", "both", "pooled", "border", None, 3, True, [], {})
COSTLY = {
    "optimizer.steps", "stage2.optimizer.steps", "model.steps", "score.copies", "model.prototypes", "model.projection",
    "stage2.hidden", "stage2.embedding", "synthetic_outliers", "run.threads", "run.compile",
}  # fmt: skip
"""Settings of which a large value takes long rather than fails: it is made and not trained. Threads are those of the
whole process, and compiling takes a minute."""


def leaves(values: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def changed(config: TrainConfig, setting: str, value: object) -> dict[str, Any]:
    """The settings of a configuration as its file has them, with one of them changed."""
    values = to_dict(config)
    *sections, name = setting.split(".")
    part = values
    for section in sections:
        part = part[section]
    part[name] = value
    return values


def candidates(value: object) -> tuple[object, ...]:
    if isinstance(value, list):
        return RANGES
    return WORDS if isinstance(value, str) else NUMBERS


@pytest.fixture
def small(tiny: TrainConfig) -> TrainConfig:
    short = {"steps": 1, "batch_size": 4, "warmup": 0}
    return replace(
        tiny,
        optimizer=replace(tiny.optimizer, **short),
        stage2=replace(tiny.stage2, optimizer=replace(tiny.stage2.optimizer, **short)),
        score=replace(tiny.score, copies=0),
        run=replace(tiny.run, threads=None),
    )


@pytest.fixture
def task(small: TrainConfig) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return task_from_dataset([(image, 0) for image in images], config=replace(small.data, normal="0"))


def test_every_value_of_every_setting_is_taken_or_refused_in_one_sentence(small: TrainConfig) -> None:
    refused = []
    for setting, value in leaves(to_dict(small)):
        for candidate in candidates(value):
            try:
                config = from_dict(TrainConfig, changed(small, setting, candidate))
                assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
            except UserError as error:
                refused.append((setting.rsplit(".", 1)[-1], candidate, str(error)))
    for name, candidate, sentence in refused:
        assert name in sentence, (candidate, sentence)
        assert len(sentence.splitlines()) == 1, (name, candidate)
    assert len(refused) > 500


SETTINGS = sorted(setting for setting, _ in leaves(to_dict(TrainConfig())) if not setting.startswith("data."))


@pytest.mark.parametrize("section", sorted({setting.split(".")[0] for setting in SETTINGS}))
def test_every_value_that_is_taken_trains(small: TrainConfig, task: Task, tmp_path: Path, section: str) -> None:
    """The extremes that a configuration accepts; the run is finished, or it says in one sentence why it is not."""
    number = 0
    for setting, value in leaves(to_dict(small)):
        if setting.split(".")[0] != section or setting.startswith("data.") or setting == "run.directory":
            continue
        taken = []
        for candidate in candidates(value):
            large = isinstance(candidate, (int, float)) and candidate > 10
            large |= isinstance(candidate, list) and any(isinstance(x, int) and x > 10 for x in candidate)
            if setting in COSTLY and (large or setting.startswith("run.")):
                continue
            try:
                config = from_dict(TrainConfig, changed(small, setting, candidate))
            except UserError:
                continue
            if config != small:
                taken.append(config)
        for config in taken[:1] + taken[-1:]:  # the smallest and the largest
            number += 1
            run = tmp_path / str(number)
            config = replace(config, run=replace(config.run, directory=str(run)))
            sentence = ""
            try:
                train(config, task=task, quiet=True)
            except UserError as error:
                sentence = str(error)
            if sentence:
                diverged = any(word in sentence for word in ("not finite", "not complete", "covariance"))
                assert diverged or not run.exists(), (setting, sentence)
                assert len(sentence.splitlines()) == 1, (setting, sentence)
            else:
                scores = load_scorer(run)(torch.rand(2, 1, 16, 16)).scores
                assert all(bool(values.isfinite().all()) for values in scores.values()), setting


def test_stage_2_that_diverges_leaves_no_finished_run(
    small: TrainConfig, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last step that ruins the weights is seen by no loss."""
    optimizer = replace(small.stage2.optimizer)
    object.__setattr__(optimizer, "learning_rate", 1e30)
    with pytest.raises(UserError, match=r"not finite.*lower .*--stage2\.optimizer\.learning-rate"):
        train(replace(small, stage2=replace(small.stage2, optimizer=optimizer)), task=task, quiet=True)
    assert not (Path(str(small.run.directory)) / "checkpoints" / "scorer.json").exists()


@pytest.mark.parametrize("fault", ["constant", "not finite"])
def test_a_run_whose_scores_say_nothing_is_not_complete(
    small: TrainConfig, task: Task, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from anomem.train import run as module

    fit = module.fit_scorer

    def fit_badly(model: Any, *arguments: Any, **options: Any) -> Scorer:
        scorer = fit(model, *arguments, **options)
        for parameter in model.encoder.parameters():
            parameter.data.fill_(0.0 if fault == "constant" else 1e38)
        return scorer

    monkeypatch.setattr(module, "fit_scorer", fit_badly)
    words = {"constant": "all the same", "not finite": "not finite"}[fault]
    with pytest.raises(
        UserError, match=rf"is not complete: the scores of its own training images are {words} \(.*plain"
    ):
        train(small, task=task, quiet=True)
    assert not (Path(str(small.run.directory)) / "checkpoints" / "scorer.json").exists()


def test_two_images_of_one_score_are_no_fault(small: TrainConfig) -> None:
    images = torch.stack([torch.zeros(1, 16, 16, dtype=torch.uint8), torch.full((1, 16, 16), 255, dtype=torch.uint8)])
    pair = task_from_dataset([(image, 0) for image in images], config=replace(small.data, normal="0"))
    model = model_for(small, pair)
    scorer = Scorer(model.eval(), "per_position", ScoreConfig())
    assert useless_scores(scorer, pair.train, 8) == ""


def test_scores_that_are_not_finite_are_refused() -> None:
    model = build_model(ModelConfig(prototypes=(4,)), (16, 16), 1, [0.5], [0.2]).eval()
    scorer = Scorer(model, "per_position", ScoreConfig())
    scorer.detector.spread.fill_(math.nan)
    images: Tensor = torch.rand(2, 1, 16, 16)
    with pytest.raises(UserError, match=r"`scores\['detector'\]`: expected finite numbers, received 2 of 2 NaN"):
        scorer(images)
