"""Cell: one setting on one class with one seed; what a sweep runs, resumes and writes as one row."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.data import Images, Task, load_task
from anomem.evaluate.report import Metrics
from anomem.models import AnoMem
from anomem.reproduce.protocol import FOLDERS, Scale, base_config, scaled, scaled_task, write_split
from anomem.scoring import Scorer
from anomem.train import RunDirectory, TrainConfig, model_for, train_stage1, train_task
from anomem.train.execution import settled
from anomem.train.run import device_of


@dataclass(frozen=True)
class Work:
    """What a measurement works on."""

    cell: Cell
    config: TrainConfig
    """With the change of the setting."""
    task: Task
    """On the device of the run."""
    run: RunDirectory
    """Takes the checkpoints of the cell's training: a killed cell goes on from them."""
    picture: Path
    """Where a measurement that draws puts its picture."""

    def trained(self) -> Scorer:
        """Both stages as configured, from the checkpoint if there is one, and the fitted scorer."""
        return train_task(self.config, self.task, self.model(), self.run, quiet=True)

    def stage1(self, images: Images, is_normal: Tensor | None) -> AnoMem:
        """Stage 1 alone, from the checkpoint if there is one.

        Args:
            images: to train on.
            is_normal: [N] bool; None when all are normal.
        """
        model = self.model()
        train_stage1(model, images, is_normal, self.config, self.run, quiet=True)
        return model

    def model(self) -> AnoMem:
        """A fresh model."""
        return model_for(self.config, self.task)


@dataclass(frozen=True)
class Setting:
    """One line of an experiment's table.

    Example:
        >>> Setting(lambda config: replace(config, synthetic_outliers=1.0), measures.trained, "synthetic outliers")
    """

    change: Callable[[TrainConfig], TrainConfig]
    """Of the data set's configuration."""
    measure: Callable[[Work], Metrics]
    """Score -> measure -> number."""
    about: str = ""
    """What it is, for the notes under the table."""
    trains: bool = True
    """Whether it takes the steps of stage 1, from which the time is estimated."""


@dataclass(frozen=True)
class Cell:
    """One setting on one class with one seed.

    Example:
        >>> cell = Cell("table7", "digits", "data", "exponential", "3", 0)
        >>> row = run_cell(cell, EXPERIMENTS["table7"].settings[cell.setting], Path("runs/table7"), "cpu")
    """

    experiment: str
    data: str
    root: str
    """Folder with the files of the data set."""
    setting: str
    normal: str
    """The normal class."""
    seed: int
    """Of the split, the weights and all other random numbers."""
    scale: Scale = field(default_factory=Scale)

    @property
    def key(self) -> tuple[str, str, int]:
        """Equal for the same cell of a sweep."""
        return self.setting, self.normal, self.seed

    @property
    def name(self) -> str:
        """Of its folder and its picture."""
        words = re.sub(r"[^\w.%]+", "-", f"{self.setting} {self.normal}").strip("-")
        return f"{words}-seed{self.seed}"

    def config(self, setting: Setting, device: str = "auto") -> TrainConfig:
        """The complete configuration, before it is scaled.

        Args:
            setting: whose change is applied.
            device: as in `RunConfig.device`.
        """
        config = setting.change(base_config(self.data, self.root, device))
        data = replace(config.data, normal=self.normal, seed=self.seed)
        if self.data == FOLDERS:  # the class is a folder, and its normal images are the only ones to train on
            data = replace(data, root=str(Path(self.root) / self.normal), normal="")
        return replace(config, data=data, run=replace(config.run, seed=self.seed))

    def task(self, config: TrainConfig) -> Task:
        """The task of its configuration, scaled, on the CPU."""
        return scaled_task(load_task(config.data), self.scale, self.seed)


def run_cell(cell: Cell, setting: Setting, sweep: Path, device: str = "auto") -> dict[str, Any]:
    """Run a cell, or go on with one that was killed.

    Args:
        cell: what to run.
        setting: its line in the experiment's table.
        sweep: folder of the sweep; the cell's checkpoints are kept in `cells/`.
        device: as in `RunConfig.device`.

    Returns:
        The row, JSON.

    Raises:
        UserError: data are missing, or a setting does not fit them.
        Interrupted: a signal stopped the training; the state is saved.
    """
    began, busy = time.perf_counter(), time.process_time()
    config = cell.config(setting, device)
    task = cell.task(config)
    named = cell.normal if cell.data == FOLDERS else task.normal  # of folders, every class is called "good"
    write_split(task, config.data, sweep / "splits", named)
    folder = sweep / "cells" / cell.name
    config = scaled(config, cell.scale, len(task.train))
    config = replace(config, run=replace(config.run, directory=str(folder)))
    run = RunDirectory(folder)
    if not run.config_file.exists():
        run = RunDirectory.create(config, ["task"])
    with run.claimed():
        task = task.to(device_of(config.run))
        work = Work(cell, config, task, run, sweep / "pictures" / f"{cell.name}.png")
        metrics = setting.measure(work)
    return {
        "setting": cell.setting,
        "normal": cell.normal,
        "seed": cell.seed,
        "class": named,
        "train_images": len(task.train),
        "test_images": len(task.test),
        "metrics": metrics,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - busy, 2),
        "device": str(device_of(config.run)),
        "precision": settled(config, device_of(config.run)).run.precision,
        "threads": torch.get_num_threads(),
    }
