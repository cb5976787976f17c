"""A run small enough for a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomem.augment import AugmentConfig
from anomem.data import DataConfig
from anomem.models import ModelConfig
from anomem.scoring import ScoreConfig
from anomem.train import LossConfig, OptimizerConfig, RunConfig, Stage2Config, Stage2OptimizerConfig, TrainConfig


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    """Six steps of both stages on 32 images a batch, with synthetic outliers."""
    short = {"steps": 6, "batch_size": 32, "warmup": 2}
    return TrainConfig(
        data=DataConfig(normal="3"),
        augment=AugmentConfig.for_dataset("digits"),
        model=ModelConfig(prototypes=(8,)),
        loss=LossConfig(max_positions=2),
        optimizer=OptimizerConfig(**short),
        stage2=Stage2Config(
            hidden=4, embedding=4, optimizer=Stage2OptimizerConfig(**short, learning_rate=0.05, clip=1.0)
        ),
        score=ScoreConfig(copies=1),
        run=RunConfig(directory=str(tmp_path / "run"), device="cpu", log_every=2),
        synthetic_outliers=0.25,
    )
