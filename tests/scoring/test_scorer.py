"""What a scorer takes and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.models import ModelConfig, build_model
from anomem.scoring import ScoreConfig, Scorer


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    model = build_model(ModelConfig(prototypes=(4,)), (16, 16), 3, [0.5] * 3, [0.2] * 3)
    return Scorer(model.eval(), "per_position", ScoreConfig())


def test_bytes_and_their_parts_of_one_score_alike(scorer: Scorer) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for name, values in scorer(images).scores.items():
        assert torch.equal(values, scorer(images / 255).scores[name])
    assert set(scorer(images).scores) == set(scorer.names)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.rand(2, 3, 20, 20),
            r"`images`: expected \[B, 3, 16, 16\], as it was trained, received shape \[2",
        ),
        (torch.rand(2, 1, 16, 16), r"expected \[B, 3, 16, 16\], as it was trained, received shape \[2, 1, 16, 16\]"),
        (torch.rand(3, 16, 16), r"expected \[B, 3, 16, 16\], as it was trained, received shape \[3, 16, 16\]"),
        (torch.ones(2, 3, 16, 16, dtype=torch.int32), r"expected uint8, or float in \[0, 1\], received torch.int32"),
        (torch.full((2, 3, 16, 16), 200.0), "expected floating pixels from 0 to 1, received 200 to 200; divide by 255"),
        (torch.full((2, 3, 16, 16), float("nan")), "expected floating pixels from 0 to 1, received nan to nan"),
    ],
    ids=["size", "channels", "no batch", "integers", "not divided", "NaN"],
)
def test_images_of_another_kind_are_refused(scorer: Scorer, images: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        scorer(images)


@pytest.mark.parametrize(
    "change",
    [
        {"distance": "l1"},
        {"pool": "median"},
        {"top_fraction": 0.0},
        {"alignment": "aligned"},
        {"copies": -1},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_settings_no_scorer_can_use(change: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        ScoreConfig(**change)
    assert caught.value.argument == f"score.{next(iter(change))}"
