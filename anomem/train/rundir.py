"""RunDirectory: the folder of a run with its configuration, log, checkpoints, metrics and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomem.errors import UserError
from anomem.files import write_atomically, writing
from anomem.train.config import TrainConfig, load_config, to_dict


class RunDirectory:
    """Paths of a run; reads and writes its configuration, log and metrics.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.given_file = path / "given.json"
        self.log_file = path / "log.jsonl"
        self.metrics_file = path / "metrics.json"
        self.scores_file = path / "scores.csv"
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, config: TrainConfig, given: Sequence[str] = ()) -> RunDirectory:
        """Make a new folder and write the configuration into it.

        Args:
            config: of the run.
            given: names of the objects passed from Python instead of configured: "task", "encoder".

        Raises:
            UserError: the folder already holds a run, or cannot be made.
        """
        run = cls(Path(config.run.directory or default_directory(config)))
        if run.config_file.exists():
            raise UserError(
                f"{run.path} already holds a run; continue it with `anomem train --resume {run.path}`, or choose "
                "another --run.directory"
            )
        with writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        if given:
            write_atomically(run.given_file, json.dumps(list(given)).encode())
        write_atomically(run.config_file, json.dumps(to_dict(config), indent=2).encode())
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

    def require_given(self, function: str, **parts: object) -> None:
        """Check that a resumed run gets the Python objects (task, encoder) it was started with.

        Args:
            function: that takes them, for the message.
            parts: the objects by name, "task" and "encoder"; None where one is not given.

        Raises:
            UserError: an object is missing.
        """
        given = json.loads(self.given_file.read_text(encoding="utf-8")) if self.given_file.exists() else []
        for name, value in parts.items():
            if name in given and value is None:
                raise UserError(
                    f"the run {self.path} was given its {name} from Python, not by its configuration; "
                    f"go on in Python and give the same {name} to `{function}`"
                )

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the log, without a last row that a crash cut off."""
        if not self.log_file.exists():
            return []
        rows = []
        for line in self.log_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log."""
        with writing(self.log_file), self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

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
    """runs/<dataset>-<normal>-<seed>; other characters than letters and digits become underscores."""
    normal = "".join(c if c.isalnum() else "_" for c in config.data.normal)
    return f"runs/{config.data.dataset}-{normal}-{config.run.seed}"
