"""RunDirectory: the folder of a run with its configuration, log, checkpoints, metrics and figures."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from anomem.data import Split
from anomem.errors import UserError
from anomem.files import write_atomically, writing
from anomem.train.config import FitConfig, TrainConfig, load_config, read_json, reading, to_dict

C = TypeVar("C", TrainConfig, FitConfig)
STAGES = ("stage1", "stage2")
LEFTOVER = re.compile(r"\..*[0-9a-f]{32}")
"""Temporary files of `anomem.files`: a process that was killed while it wrote leaves one."""
_claimed: set[str] = set()
_claimed_guard = threading.Lock()


class RunDirectory:
    """Paths of a run; reads and writes its configuration, log and metrics.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.given_file = path / "given.json"
        self.split_file = path / "split.json"
        self.lock_file = path / ".lock"
        self.log_file = path / "log.jsonl"
        self.metrics_file = path / "metrics.json"
        self.scores_file = path / "scores.csv"
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(
        cls, config: TrainConfig | FitConfig, given: Sequence[str] = (), split: Split | None = None
    ) -> RunDirectory:
        """As `created`, without a claim afterwards."""
        with cls.created(config, given, split) as run:
            return run

    @classmethod
    @contextmanager
    def created(
        cls, config: TrainConfig | FitConfig, given: Sequence[str] = (), split: Split | None = None
    ) -> Iterator[RunDirectory]:
        """A new folder with the configuration in it, claimed until the end of the scope.

        Args:
            config: of the run.
            given: names of the objects passed from Python instead of configured: "task", "encoder".
            split: the files it is trained on, where they are known.

        Raises:
            UserError: the folder already holds a run or other files, or cannot be made.
        """
        run = cls(Path(config.run.directory or default_directory(config)))
        with writing(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        with run.claimed():
            if run.is_fitted() and not run.checkpoints.exists():
                run.config_file.unlink()  # of a fit that was killed; there is nothing to continue
            if run.is_fitted():
                raise UserError(f"{run.path} already holds a run; choose another --run.directory")
            if run.config_file.exists():
                raise UserError(
                    f"{run.path} already holds a run; continue it with `anomem train --resume {run.path}`, or choose "
                    "another --run.directory"
                )
            # A process killed just here leaves files of ours without a configuration.
            ours = (run.given_file.name, run.split_file.name)
            if not all(entry.name.startswith(".") or entry.name in ours for entry in run.path.iterdir()):
                raise UserError(f"{run.path} holds other files; choose a new or empty folder as --run.directory")
            for file in (run.given_file, run.split_file):
                file.unlink(missing_ok=True)
            if given:
                write_atomically(run.given_file, json.dumps(list(given)).encode())
            if split is not None:
                write_atomically(run.split_file, json.dumps(split._asdict(), indent=2).encode())
            write_atomically(run.config_file, json.dumps(to_dict(config), indent=2).encode())
            yield run

    @classmethod
    def open(
        cls, path: Path, *, device: str | None = None, root: str | None = None
    ) -> tuple[RunDirectory, TrainConfig]:
        """An existing run and its configuration.

        Args:
            path: the folder.
            device: in place of the configured `run.device`, for a run of another machine.
            root: in place of the configured `data.root`, where the images have moved.

        Raises:
            UserError: the folder holds no run, or its configuration is damaged.
        """
        run = cls(path)
        with reading(path):
            found = run.config_file.exists()
        if not found:
            raise UserError(f"{path} holds no run: expected the file {run.config_file}")
        if run.is_fitted():
            raise UserError(f"{path} holds a fitted detector, which is not trained; expected a run of `anomem train`")
        return run, moved(load_config(TrainConfig, run.config_file), device, root)

    @classmethod
    def open_fitted(
        cls, path: Path, *, device: str | None = None, root: str | None = None
    ) -> tuple[RunDirectory, FitConfig]:
        """An existing run of `fit` and its configuration; the arguments are those of `open`.

        Raises:
            UserError: the folder holds no such run, or its configuration is damaged.
        """
        run = cls(path)
        if not run.is_fitted():
            raise UserError(f"{path} holds no run of `anomem fit`")
        return run, moved(load_config(FitConfig, run.config_file), device, root)

    def is_fitted(self) -> bool:
        """Whether it is a run of `fit`, whose configuration has the part `fill`; False where there is no run.

        Raises:
            UserError: the configuration is damaged.
        """
        with reading(self.path):
            found = self.config_file.exists()
        values = read_json(self.config_file) if found else None
        return isinstance(values, dict) and "fill" in values

    def split(self) -> Split | None:
        """The files that the run was trained on, or None where they are not known.

        Raises:
            UserError: the file that lists them is damaged.
        """
        if not self.split_file.exists():
            return None
        try:
            lists = json.loads(self.split_file.read_text(encoding="utf-8"))
            normal, anomalous = (tuple(lists[name]) for name in Split._fields)
            if not all(isinstance(name, str) for name in (*normal, *anomalous)):
                raise TypeError("not a list of names")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.split_file} is damaged ({error}); train the run anew") from error
        return Split(normal, anomalous)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Around everything that writes the run: no other training or resumption of it can begin meanwhile.

        The claim is a lock on a file that the operating system drops with the process. Temporary files of processes
        that were killed are removed.

        Raises:
            UserError: another process, or another thread, holds the claim.
        """
        taken = UserError(
            f"{self.path} is being trained by another process; wait until it ends, or choose another --run.directory"
        )
        key = os.path.realpath(self.path)
        with _claimed_guard:  # the lock is one of processes: threads of this one need their own
            if key in _claimed:
                raise taken
            _claimed.add(key)
        try:
            with writing(self.lock_file):
                file = _lock(self.lock_file)
            if file is None:
                raise taken
            try:
                for folder in (self.path, self.checkpoints, self.figures):
                    remove_leftovers(folder)
                yield
            finally:
                # Before the lock is dropped; `_lock` looks whether the file it has locked is still there.
                self.lock_file.unlink(missing_ok=True)
                os.close(file)
        finally:
            _claimed.discard(key)

    def require_given(self, function: str, **parts: object) -> None:
        """Check that a resumed run gets the Python objects (task, encoder) it was started with.

        Args:
            function: that takes them, for the message.
            parts: the objects by name, "task" and "encoder"; None where one is not given.

        Raises:
            UserError: an object is missing.
        """
        given = read_json(self.given_file) if self.given_file.exists() else []
        if not isinstance(given, list):
            raise UserError(
                f"{self.given_file} is damaged: expected a list of names such as task and encoder; train a new run"
            )
        for name, value in parts.items():
            if name in given and value is None:
                raise UserError(
                    f"the run {self.path} was given its {name} from Python, not by its configuration; "
                    f"go on in Python and give the same {name} to `{function}`"
                )

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the log, without a last row that a crash cut off.

        Raises:
            UserError: another row is damaged.
        """
        if not self.log_file.exists():
            return []
        with reading(self.log_file):
            lines = self.log_file.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, 1):
            row = _row(line)
            if row is not None:
                rows.append(row)
            elif any(later.strip() for later in lines[number:]):
                raise UserError(
                    f"line {number} of {self.log_file} is damaged: expected a JSON object with a stage and a step; "
                    "delete this line"
                )
        return rows

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log, without values that are not finite: JSON has no NaN."""
        finite = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        with writing(self.log_file), self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def keep_rows(self, stage: str, step: int) -> None:
        """Drop the rows of a stage from a step on, and of the stages after it: a resumed run writes them again."""
        kept = [
            row
            for row in self.rows()
            if STAGES.index(row["stage"]) < STAGES.index(stage) or (row["stage"] == stage and row["step"] <= step)
        ]
        write_atomically(self.log_file, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Replace `metrics.json`."""
        write_atomically(self.metrics_file, (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode())


def moved(config: C, device: str | None, root: str | None) -> C:
    """A configuration with another device or another folder of images, where they are given."""
    run = config.run if device is None else replace(config.run, device=device)
    data = config.data if root is None else replace(config.data, root=root)
    return replace(config, run=run, data=data)


def default_directory(config: TrainConfig | FitConfig) -> str:
    """runs/<dataset>-<normal>-<seed>; other characters than letters and digits become underscores."""
    names = (config.data.dataset, config.data.normal or Path(config.data.root).resolve().name)
    dataset, normal = ("".join(c if c.isalnum() else "_" for c in name)[:60] for name in names)
    return f"runs/{dataset}-{normal}-{config.run.seed}"


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Remove the temporary files that processes left in a folder when they were killed while they wrote.

    Args:
        folder: need not exist.
        older_than: seconds since they were last written, for a folder that another process may be writing to.
    """
    with suppress(OSError):  # a folder that cannot be read holds nothing of ours
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime >= older_than:
                path.unlink(missing_ok=True)


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of the log, or None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) and row.get("stage") in STAGES else None
    return row if isinstance(step, int) else None


def _lock(path: Path) -> int | None:
    """An open, locked file, or None where another process has locked it."""
    import fcntl

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(file)
                return None
            return file  # a file system without locks: nothing to claim with
        # Its last holder removes the file: a lock on a removed one excludes nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)
