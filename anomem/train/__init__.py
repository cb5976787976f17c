"""Training: configuration, stage 1, stage 2, checkpoints and run directories."""

from anomem.train.config import (
    LossConfig,
    OptimizerConfig,
    RunConfig,
    Stage2Config,
    Stage2OptimizerConfig,
    TrainConfig,
    preset,
)
from anomem.train.run import load_run, load_scorer, model_for, resume, train, train_task
from anomem.train.rundir import RunDirectory
from anomem.train.stage1 import train_stage1
from anomem.train.stage2 import train_stage2

__all__ = [
    "LossConfig",
    "OptimizerConfig",
    "RunConfig",
    "RunDirectory",
    "Stage2Config",
    "Stage2OptimizerConfig",
    "TrainConfig",
    "load_run",
    "load_scorer",
    "model_for",
    "preset",
    "resume",
    "train",
    "train_stage1",
    "train_stage2",
    "train_task",
]
