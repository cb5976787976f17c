"""Training: configuration, stage 1, stage 2, checkpoints and run directories."""

from anomem.train.config import (
    FitConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    Stage2Config,
    Stage2OptimizerConfig,
    TrainConfig,
    preset,
)
from anomem.train.fitting import fit, fit_run, load_detector, save_detector
from anomem.train.run import load_run, load_scorer, model_for, resume, train, train_task
from anomem.train.rundir import RunDirectory
from anomem.train.stage1 import train_stage1
from anomem.train.stage2 import train_stage2

__all__ = [
    "FitConfig",
    "LossConfig",
    "OptimizerConfig",
    "RunConfig",
    "RunDirectory",
    "Stage2Config",
    "Stage2OptimizerConfig",
    "TrainConfig",
    "fit",
    "fit_run",
    "load_detector",
    "load_run",
    "load_scorer",
    "model_for",
    "preset",
    "resume",
    "save_detector",
    "train",
    "train_stage1",
    "train_stage2",
    "train_task",
]
