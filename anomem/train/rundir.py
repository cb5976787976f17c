"""The folder of a run: configuration, logs, checkpoints, metrics and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anomem.errors import UserError
from anomem.files import write_atomically
from anomem.train.config import TrainConfig
from anomem.train.serialize import load_config, to_dict


class RunDirectory:
    """Paths of a run, and the files people read.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.log_file = path / "log.jsonl"
        self.metrics_file = path / "metrics.json"
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, config: TrainConfig) -> RunDirectory:
        """A new folder with its configuration in it.

        Raises:
            UserError: the folder already holds a run, or cannot be made.
        """
        run = cls(Path(config.run.directory or default_directory(config)))
        if run.config_file.exists():
            raise UserError(
                f"{run.path} already holds a run; continue it with `anomem train --resume {run.path}`, or choose "
                "another --run.directory"
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_atomically(run.config_file, json.dumps(to_dict(config), indent=2).encode())
        except OSError as error:
            raise UserError(f"cannot write the run directory {run.path}: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> tuple[RunDirectory, TrainConfig]:
        """An existing run and its configuration.

        Raises:
            UserError: the folder holds no run, or its configuration is damaged.
        """
        run = cls(path)
        if not run.config_file.exists():
            raise UserError(f"{path} holds no run: expected the file {run.config_file}")
        return run, load_config(TrainConfig, run.config_file)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the log; a row cut off by a crash is left out."""
        if not self.log_file.exists():
            return []
        rows = []
        for line in self.log_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def keep_rows(self, stage: str, step: int) -> None:
        """Drop the rows of a stage from a step on, and of the stages after it: a resumed run writes them again."""
        order = ("stage1", "stage2")
        kept = [
            row
            for row in self.rows()
            if order.index(row["stage"]) < order.index(stage) or (row["stage"] == stage and row["step"] <= step)
        ]
        write_atomically(self.log_file, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Replace `metrics.json`."""
        write_atomically(self.metrics_file, (json.dumps(metrics, indent=2) + "\n").encode())


def default_directory(config: TrainConfig) -> str:
    """runs/<dataset>-<normal>-<seed>, with what a path cannot hold replaced."""
    normal = "".join(c if c.isalnum() else "_" for c in config.data.normal)
    return f"runs/{config.data.dataset}-{normal}-{config.run.seed}"
