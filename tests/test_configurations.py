"""A configuration names the setting that is no number: a text, a tensor, NaN or a list."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from anomem.augment import AugmentConfig
from anomem.data import DataConfig
from anomem.errors import ArgumentError
from anomem.models import ModelConfig
from anomem.scoring.config import FillConfig, ScoreConfig
from anomem.train.config import FitConfig, LossConfig, OptimizerConfig, RunConfig, Stage2Config, TrainConfig

CONFIGURATIONS: tuple[type[Any], ...] = (
    AugmentConfig, DataConfig, FillConfig, FitConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig, ScoreConfig,
    Stage2Config, TrainConfig,
)  # fmt: skip


def numeric_settings(kind: type[Any]) -> Iterator[tuple[str, bool]]:
    """Name of each setting that is a number, or, where True, a tuple of numbers."""
    for name, hint in typing.get_type_hints(kind).items():
        choices = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        if choices & {int, float}:
            yield name, False
        elif any(set(typing.get_args(choice)) & {int, float} for choice in choices):
            yield name, True


@pytest.mark.parametrize("kind", CONFIGURATIONS, ids=lambda kind: kind.__name__)
def test_a_setting_that_is_no_number_is_named(kind: type[Any]) -> None:
    names = dict(numeric_settings(kind))
    assert names.keys() <= {field.name for field in dataclasses.fields(kind)}
    assert names
    for name, several in names.items():
        for wrong in ("1", float("nan"), torch.tensor(1.0), [[]]):
            with pytest.raises(ArgumentError) as raised:
                kind(**{name: (wrong, wrong) if several else wrong})
            assert raised.value.argument.split(".")[-1] == name
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "name", "text"), [(ModelConfig, "scales", "block1"), (ModelConfig, "prototypes", 64)])
def test_one_value_is_not_taken_for_a_sequence(kind: type[Any], name: str, text: object) -> None:
    with pytest.raises(ArgumentError, match=f"`model.{name}`: expected a sequence, received {text!r}"):
        kind(**{name: text})
