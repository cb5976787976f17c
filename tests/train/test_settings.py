"""Configurations as JSON, the schedule, and the order of the batches."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anomem.data import ResidentImages
from anomem.errors import ArgumentError, UserError
from anomem.models import ModelConfig, build_model
from anomem.train import OptimizerConfig, TrainConfig
from anomem.train.batches import training_batches
from anomem.train.optimizer import build_optimizer, check_optimizer, learning_rate
from anomem.train.presets import NAMES, preset
from anomem.train.serialize import from_dict, load_config, to_dict


@pytest.mark.parametrize("name", NAMES)
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
    assert all(group["nesterov"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"momentum": 1.0}, {"warmup": -1}]
)
def test_numbers_no_run_can_use(change: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(change))):
        check_optimizer(dataclasses.replace(OptimizerConfig(), **change))  # type: ignore[arg-type]


def test_batches_visit_every_image_once_an_epoch_and_resume_anywhere() -> None:
    images = ResidentImages(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1))
    whole = [(step, index.tolist()) for step, _, index in training_batches(images, 4, 3, 0, 9)]
    assert [step for step, _ in whole] == list(range(9))
    for epoch in range(4):
        seen = whole[2 * epoch][1] + whole[2 * epoch + 1][1]
        assert len(set(seen)) == 8  # two images of each epoch are left over
    assert whole[0][1] != whole[2][1]
    for start in (1, 2, 5):
        rest = [(step, index.tolist()) for step, _, index in training_batches(images, 4, 3, start, 9)]
        assert rest == whole[start:]
    assert [len(index) for _, _, index in training_batches(images, 1024, 3, 0, 2)] == [10, 10]
