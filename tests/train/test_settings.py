"""Configurations as JSON, the schedule, and the order of the batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from anomem.data import ResidentImages
from anomem.errors import ArgumentError, UserError
from anomem.models import ModelConfig, build_model
from anomem.train import (
    LossConfig,
    OptimizerConfig,
    RunConfig,
    Stage2Config,
    Stage2OptimizerConfig,
    TrainConfig,
    preset,
)
from anomem.train.batches import build_optimizer, learning_rate, training_batches
from anomem.train.config import Preset, from_dict, load_config, to_dict


@pytest.mark.parametrize("name", get_args(Preset))
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"lr": 1}}, r"`optimizer\.lr`: no such setting; expected one of steps"),
        ({"optimiser": {}}, r"`optimiser`: no such setting"),
        ({"optimizer": {"steps": "many"}}, r"`optimizer\.steps`: expected int, received \"many\""),
        ({"optimizer": {"steps": True}}, r"`optimizer\.steps`: expected int, received true"),
        ({"model": {"backbone": "vgg"}}, r"`model\.backbone`: expected one of 'small'"),
        ({"model": {"prototypes": 3}}, r"`model\.prototypes`: expected tuple"),
        ({"augment": {"zoom": [1, 2, 3]}}, r"`augment\.zoom`"),
        ({"run": 3}, r"`run\.`: expected an object"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, values)


def test_settings_left_out_keep_their_defaults() -> None:
    config = from_dict(TrainConfig, {"optimizer": {"learning_rate": 1, "clip": 2}, "model": {"prototypes": [1, 2, 3]}})
    assert config.optimizer == replace(OptimizerConfig(), learning_rate=1.0, clip=2.0)
    assert config.model.prototypes == (1, 2, 3)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_config(TrainConfig, tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_config(TrainConfig, tmp_path / "x.json")


def test_rate_warms_up_and_anneals() -> None:
    config = OptimizerConfig(steps=110, warmup=10, learning_rate=0.4)
    rates = [learning_rate(config, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.2)
    assert 0 < rates[-1] < 2e-4
    # The same curve as torch's own two schedulers, one after the other.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for rate in rates[10:]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-12)
        optimizer.step()
        cosine.step()


def test_memories_are_not_decayed() -> None:
    model = build_model(ModelConfig(projection=4), (16, 16), 1, [0.5], [0.5])
    optimizer = build_optimizer(OptimizerConfig(), model.encoder.parameters(), model.memories.parameters())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[id(p)] == 0 for p in model.memories.parameters())
    assert all(decay[id(p)] == 5e-4 for p in model.encoder.parameters())
    assert all(group["nesterov"] and group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("kind", "change", "argument"),
    [
        (OptimizerConfig, {"steps": -1}, "optimizer.steps"),
        (OptimizerConfig, {"batch_size": 1}, "optimizer.batch_size"),
        (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning_rate"),
        (OptimizerConfig, {"momentum": 1.0}, "optimizer.momentum"),
        (OptimizerConfig, {"weight_decay": -1.0}, "optimizer.weight_decay"),
        (OptimizerConfig, {"warmup": -1}, "optimizer.warmup"),
        (OptimizerConfig, {"clip": 0.0}, "optimizer.clip"),
        (OptimizerConfig, {"ema": 1.0}, "optimizer.ema"),
        (OptimizerConfig, {"accumulate": 0}, "optimizer.accumulate"),
        (OptimizerConfig, {"batch_size": 5, "accumulate": 3}, "optimizer.accumulate"),
        (OptimizerConfig, {"batch_size": 4, "micro_batch": 5}, "optimizer.micro_batch"),
        (RunConfig, {"precision": "float16"}, "run.precision"),
        (RunConfig, {"memory_format": "rows"}, "run.memory_format"),
        (RunConfig, {"parallel": "tensor"}, "run.parallel"),
        (Stage2OptimizerConfig, {"steps": 0}, "stage2.optimizer.steps"),
        (Stage2Config, {"margin": 0.99}, "stage2.margin"),
        (Stage2Config, {"hidden": 0}, "stage2.hidden"),
        (Stage2Config, {"embedding": 0}, "stage2.embedding"),
        (LossConfig, {"temperature": 0.0}, "loss.temperature"),
        (LossConfig, {"variance_weight": -1.0}, "loss.variance_weight"),
        (LossConfig, {"negatives": "all"}, "loss.negatives"),
        (LossConfig, {"positive": "none"}, "loss.positive"),
        (RunConfig, {"threads": 0}, "run.threads"),
        (RunConfig, {"log_every": 0}, "run.log_every"),
        (RunConfig, {"checkpoint_every": -1}, "run.checkpoint_every"),
        (TrainConfig, {"synthetic_outliers": -1.0}, "synthetic_outliers"),
        (TrainConfig, {"prototypes_from": "images"}, "prototypes_from"),
    ],
)
def test_a_configuration_refuses_what_no_run_can_use(kind: Any, change: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        kind(**change)
    assert caught.value.argument == argument
    with pytest.raises(ArgumentError):
        replace(kind(), **change)


def test_a_file_with_a_number_no_run_can_use_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"stage2": {"optimizer": {"clip": 0}}}')
    with pytest.raises(UserError, match=rf"{file}: `stage2\.optimizer\.clip`: expected a number > 0"):
        load_config(TrainConfig, file)


def test_batches_visit_every_image_once_an_epoch_and_resume_anywhere() -> None:
    images = ResidentImages(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1))
    whole = [(batch.step, batch.indices.tolist()) for batch in training_batches(images, 4, 3, 0, 9)]
    assert [step for step, _ in whole] == list(range(9))
    for epoch in range(4):
        seen = whole[2 * epoch][1] + whole[2 * epoch + 1][1]
        assert len(set(seen)) == 8  # two images of each epoch are left over
    assert whole[0][1] != whole[2][1]
    for start in (1, 2, 5):
        rest = [(batch.step, batch.indices.tolist()) for batch in training_batches(images, 4, 3, start, 9)]
        assert rest == whole[start:]


def test_a_process_reads_its_places_of_the_same_batches() -> None:
    images = ResidentImages(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1))
    whole = [batch.indices for batch in training_batches(images, 4, 3, 0, 5)]
    for indices, batch in zip(whole, training_batches(images, 4, 3, 0, 5, places=(2, 3, 0)), strict=True):
        assert torch.equal(batch.indices, indices[[2, 3, 0]])
        assert torch.equal(batch.at(range(2, 4))[:, 0, 0, 0], indices[2:4].to(torch.uint8))


def test_every_seed_has_its_own_order() -> None:
    # torch's CPU generator reads the lower 32 bits of a seed.
    images = ResidentImages(torch.zeros(50, 1, 1, 1, dtype=torch.uint8))
    orders = {tuple(next(training_batches(images, 50, seed, 0, 1)).indices.tolist()) for seed in range(8)}
    assert len(orders) == 8
