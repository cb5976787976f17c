"""Sweep: the cells of an experiment in parallel processes; resumable, one JSON row per finished cell.

A sweep's folder holds `sweep.json` (command, commit, machine), `rows.jsonl`, `splits/`, `pictures/`, `table.md` and,
while cells run, `cells/` with their checkpoints. Only the parent process writes rows, each in one write.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import anomem
from anomem.data import load_task
from anomem.errors import UserError
from anomem.files import make_folder, write_atomically, writing
from anomem.reproduce.cell import Cell, Setting, run_cell
from anomem.reproduce.experiments import EXPERIMENTS
from anomem.reproduce.protocol import (
    CLASS_NAMES,
    CLASSES,
    FOLDERS,
    PAPER_DATA,
    PROBE,
    Scale,
    folder_classes,
    scaled,
    seconds_per_step,
)
from anomem.train import RunDirectory, TrainConfig
from anomem.train.config import read_json
from anomem.train.monitor import duration
from anomem.train.run import device_of
from anomem.train.stopping import Interrupted, stopping_at_once
from anomem.validation import require, require_choice, require_count


@dataclass(frozen=True)
class Sweep:
    """Which cells of an experiment run, and where.

    Example:
        >>> sweep = Sweep("table7", "digits", Path("runs/table7"), classes=("3", "8"), seeds=(0, 1, 2))
        >>> rows = run(sweep)  # resumes what is there
    """

    experiment: str
    data: str
    output: Path
    """Folder of the sweep."""
    root: str = "data"
    """Folder with the files of the data set."""
    classes: tuple[str, ...] = ()
    """Normal classes; all when empty."""
    settings: tuple[str, ...] = ()
    """Settings of the experiment; all when empty."""
    seeds: tuple[int, ...] | None = None
    """None takes the experiment's own."""
    scale: Scale = field(default_factory=Scale)
    jobs: int | None = None
    """Processes; None takes one per core for small data sets on a CPU, else one."""
    device: str = "auto"
    command: str = ""
    """As it was typed; stands in the files."""

    def __post_init__(self) -> None:
        require_choice(self.experiment, "experiment", tuple(EXPERIMENTS))
        experiment = EXPERIMENTS[self.experiment]
        require_choice(self.data, "data", experiment.data)
        for name in self.settings:
            require_choice(name, "settings", tuple(experiment.settings))
        require(self.seeds is None or len(self.seeds) > 0, "seeds", "at least one seed", "none")
        for seed in self.seeds or ():
            require_count(seed, "seeds", 0, 2**31 - 1)
        if self.jobs is not None:
            require_count(self.jobs, "jobs", 1, 1024)
        known = folder_classes(self.root) if self.data == FOLDERS else CLASSES[self.data]
        # CIFAR's classes may also be given by their names; its files say which there are.
        for name in self.classes if self.data not in PAPER_DATA else ():
            require(name in known, "classes", lambda: f"one of {', '.join(known)}", repr(name))
        for what, given in (("seeds", self.seeds or ()), ("classes", self.normals)):
            require(len(set(given)) == len(given), what, "each once", " ".join(map(str, given)))

    @property
    def normals(self) -> tuple[str, ...]:
        """The normal classes; CIFAR's by their numbers, so that a class has the same cells however it is named."""
        if not self.classes:
            return folder_classes(self.root) if self.data == FOLDERS else CLASSES[self.data]
        numbers = {name: str(i) for i, name in enumerate(CLASS_NAMES.get(self.data, ()))}
        return tuple(numbers.get(name, name) for name in self.classes)

    @property
    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that a stopped sweep has whole tables of its first seeds.

        A setting that changes nothing on this data set, M = 64 where that is the preset's, is left out.
        """
        experiment = EXPERIMENTS[self.experiment]
        classes = self.normals
        names, seen = [], []
        for name, setting in experiment.settings.items():
            what = Cell(self.experiment, self.data, self.root, name, classes[0], 0).config(setting), setting.measure
            if (not self.settings or name in self.settings) and what not in seen:
                seen.append(what)
                names.append(name)
        return [
            Cell(self.experiment, self.data, self.root, name, normal, seed, self.scale)
            for seed in (experiment.seeds if self.seeds is None else self.seeds)
            for name in names
            for normal in classes
        ]

    @property
    def processes(self) -> int:
        """Number of processes."""
        if self.jobs is not None:
            return self.jobs
        on_cpu = self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available())
        return cores() if on_cpu and self.data not in PAPER_DATA else 1


def run(sweep: Sweep, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run the cells that the folder does not hold yet.

    Args:
        sweep: which cells, and where.
        say: gets a line for each finished cell.

    Returns:
        All rows of the folder.

    Raises:
        UserError: the folder is another command's or another commit's, data or a class are missing, or a cell fails.
        Interrupted: a signal; finished cells are kept, and the same command goes on.
    """
    make_folder(sweep.output)
    file = sweep.output / "rows.jsonl"
    with ExitStack() as stack:
        try:
            stack.enter_context(RunDirectory(sweep.output).claimed())
        except UserError as error:
            raise UserError(
                f"{sweep.output}: another process works on this sweep; wait, or take another --output"
            ) from error
        header = write_header(sweep)
        done = {(row["setting"], row["normal"], row["seed"]) for row in read_rows(file)}
        cut_torn_row(file)
        cells = sweep.cells
        missing = [cell for cell in cells if cell.key not in done]
        finished = len(cells) - len(missing)
        _write_header(sweep.output, {**header, "cells": len(done.union(cell.key for cell in cells))})
        say(f"[{finished}/{len(cells)}] cells are finished" + (" already" if finished else ""))
        if missing:
            say(estimate(sweep, missing))
        began = time.monotonic()
        try:
            with stopping_at_once():
                for count, (cell, row) in enumerate(_finished(sweep, missing), 1):
                    append_row(file, row)
                    shutil.rmtree(sweep.output / "cells" / cell.name, ignore_errors=True)
                    left = (time.monotonic() - began) / count * (len(missing) - count)
                    say(f"[{finished + count}/{len(cells)}] {_about(cell, row)}; {duration(left)} left")
        except KeyboardInterrupt as stop:
            kept = {(row["setting"], row["normal"], row["seed"]) for row in read_rows(file)}
            ours = sum(cell.key in kept for cell in cells)
            sentence = f"stopped; {ours} of {len(cells)} cells are finished and kept; the same command goes on"
            raise Interrupted(getattr(stop, "signal", 2), sentence) from None
    return read_rows(file)


def estimate(sweep: Sweep, cells: Sequence[Cell]) -> str:
    """Time of the cells, from one step of a small batch on this machine; also checks that the data are there.

    A step is timed for each encoder among the cells.

    Args:
        sweep: of the cells.
        cells: at least one.
    """
    settings = EXPERIMENTS[sweep.experiment].settings
    training: dict[str, list[Cell]] = {}
    for cell in cells:
        if settings[cell.setting].trains:
            training.setdefault(cell.config(settings[cell.setting]).model.backbone, []).append(cell)
    config = cells[0].config(settings[cells[0].setting], sweep.device)
    if sweep.data in PAPER_DATA:
        for normal in sweep.classes:  # a wrong name fails before the first cell
            load_task(replace(config.data, normal=normal))
    processes = min(sweep.processes, len(cells))
    parts = [f"{len(cells)} cells in {processes} processes of {threads_of(processes)} threads"]
    total, images = 0.0, len(cells[0].task(config).train)
    for cell, *others in training.values():
        full, seconds = _step_of(cell, settings[cell.setting], sweep)
        each = seconds * full.optimizer.steps
        total += each * (1 + len(others))
        parts.append(
            f"stage 1 of {cell.setting}: {full.optimizer.steps} steps of {min(full.optimizer.batch_size, images)} "
            f"images, about {duration(each)} a class"
        )
    if training:
        parts.append(f"stage 1 takes {duration(total / processes)} in all (from steps of {min(PROBE, images)} images)")
    return "; ".join(parts)


def _step_of(cell: Cell, setting: Setting, sweep: Sweep) -> tuple[TrainConfig, float]:
    """The scaled configuration of a cell, and the seconds of one of its steps in a process of the sweep."""
    config = cell.config(setting, sweep.device)
    task = cell.task(config)
    config = scaled(config, sweep.scale, len(task.train))
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of(sweep.processes))
    try:
        return config, seconds_per_step(config, task.to(device_of(config.run)), PROBE)[0]
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(processes: int) -> int:
    """The share of this process's torch threads that each of so many processes gets; OMP_NUM_THREADS counts."""
    return max(1, torch.get_num_threads() // processes)


def _finished(sweep: Sweep, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its row, as they finish."""
    if sweep.processes == 1 or len(cells) == 1:
        for cell in cells:
            yield cell, _row(cell, sweep.output, sweep.device)
        return
    # Not forked: a thread pool of torch does not survive a fork.
    pool = ProcessPoolExecutor(
        min(sweep.processes, len(cells)),
        multiprocessing.get_context("spawn"),
        _begin_worker,
        (threads_of(sweep.processes),),
    )
    try:
        running: dict[Future[dict[str, Any]], Cell] = {
            pool.submit(_row_of_worker, cell, sweep.output, sweep.device): cell for cell in cells
        }
        while running:
            done = wait(running, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=lambda future: future.exception() is not None):  # rows before a failure
                yield running.pop(future), future.result()
    except BaseException as error:
        # The other cells save their state and end; without this the pool would run them to their ends.
        for child in multiprocessing.active_children():
            child.terminate()
        if not isinstance(error, BrokenProcessPool):
            raise
        raise UserError(
            "a process of the sweep was killed, perhaps out of memory; finished cells are kept: run the same command "
            "with fewer --jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    """Give a worker its share of the threads, and end it when the sweep is killed."""
    torch.set_num_threads(threads)

    def end_with_the_sweep() -> None:
        sweep = multiprocessing.parent_process()
        if sweep is not None:
            sweep.join()
            os._exit(1)

    threading.Thread(target=end_with_the_sweep, daemon=True).start()


def _row_of_worker(cell: Cell, output: Path, device: str) -> dict[str, Any]:
    """`_row` in a worker, which ends on a signal: the pool would give it the next cell."""
    try:
        return _row(cell, output, device)
    except KeyboardInterrupt as stop:
        os._exit(128 + getattr(stop, "signal", signal.SIGINT))


def _row(cell: Cell, output: Path, device: str) -> dict[str, Any]:
    setting = EXPERIMENTS[cell.experiment].settings[cell.setting]
    try:
        return run_cell(cell, setting, output, device)
    except UserError as error:
        # ArgumentError too: only the sentence is sent from a worker.
        raise UserError(f"{cell.setting}, {cell.normal}, seed {cell.seed}: {error}") from None


def _about(cell: Cell, row: dict[str, Any]) -> str:
    scores = [(name, row["metrics"].get(name, {})) for name in EXPERIMENTS[cell.experiment].scores]
    shown = ", ".join(f"{name} {values['auroc']:.4f}" for name, values in scores if "auroc" in values)
    return f"{cell.setting}, {row['class']}, seed {cell.seed}: {shown}; {row['seconds']:.0f} s"


def commit() -> str:
    """The state of the code: the commit, with a digest of the package's sources where they differ from it.

    Outside of a checkout the version takes the place of the commit.
    """
    package = Path(anomem.__file__).parent

    def git(*arguments: str) -> str:
        try:
            found = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return found.stdout.strip()

    # A package that lies in another project's checkout is not of its commit.
    head = git("rev-parse", "--short=12", "HEAD") if git("ls-files", "__init__.py") else ""
    changed = not head or git("status", "--porcelain", "--", ".", "../kernels", "../csrc")
    head = head or f"version {anomem.__version__}"
    if changed:
        digest = hashlib.sha256()
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
        return f"{head}+{digest.hexdigest()[:8]}"
    return head


def processor() -> str:
    """The instruction set that torch uses, and the GPU where there is one."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{cpu}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu


def write_header(sweep: Sweep) -> dict[str, Any]:
    """Write `sweep.json`, or check that the one there is this sweep's.

    Returns:
        Its content.

    Raises:
        UserError: the folder is another command's or another commit's, or holds other files.
    """
    path = sweep.output / "sweep.json"
    now: dict[str, Any] = {
        **_identity(sweep),
        "scale": asdict(sweep.scale),
        "commit": commit(),
        "command": sweep.command,
        "torch": importlib.metadata.version("torch"),
        "processor": processor(),
    }
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in sweep.output.iterdir()):
            raise UserError(f"`output`: {sweep.output} holds other files; choose a new or empty folder")
        _write_header(sweep.output, now)
        return now
    then = _same_header(sweep, now, ("experiment", "data", "root", "scale"))
    if then["commit"] != now["commit"]:
        raise UserError(
            f"`output`: {sweep.output} was begun with the code {then['commit']}, this is {now['commit']}, and rows of "
            "two states of the code do not mix; choose another --output"
        )
    commands = [then.get("command"), *then.get("continued", [])]
    if sweep.command not in commands:  # more seeds or classes
        then["continued"] = [*commands[1:], sweep.command]
    return then


def check_folder(sweep: Sweep) -> None:
    """Check that the folder holds rows of this experiment on these data, of any commit and scale.

    Raises:
        UserError: it holds no finished cell, or another sweep.
    """
    read_sweep(sweep.output)
    _same_header(sweep, _identity(sweep), ("experiment", "data"))


def _identity(sweep: Sweep) -> dict[str, Any]:
    """Experiment, data set and, for folders, their name and their place seen from the sweep's folder."""
    if sweep.data != FOLDERS:
        return {"experiment": sweep.experiment, "data": sweep.data, "root": None}
    root, output = Path(os.path.realpath(sweep.root)), os.path.realpath(sweep.output)
    place = Path(os.path.relpath(root, output)).as_posix()
    return {"experiment": sweep.experiment, "data": root.name, "root": place}


def _same_header(sweep: Sweep, now: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The header that is there; its entries of these names must be equal."""
    path = sweep.output / "sweep.json"
    then = read_json(path)
    if not isinstance(then, dict) or "commit" not in then:
        raise UserError(f"`output`: {path} is damaged; choose another --output")
    for name in names:
        if then.get(name) != now[name]:
            raise UserError(
                f"`output`: {sweep.output} holds another sweep (`{then.get('command')}`: its {name} is "
                f"{json.dumps(then.get(name))}, here {json.dumps(now[name])}); choose another --output"
            )
    return then


def _write_header(folder: Path, header: dict[str, Any]) -> None:
    write_atomically(folder / "sweep.json", json.dumps(header, indent=2).encode())


def read_sweep(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a sweep.

    Raises:
        UserError: the folder holds no finished cell, or a damaged row.
    """
    rows = read_rows(folder / "rows.jsonl")
    if not rows:
        raise UserError(f"{folder} holds no finished cell")
    return read_json(folder / "sweep.json"), rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, [] if there is none; a last line that a crash cut off is left out.

    Raises:
        UserError: another line is damaged.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["setting"], row["normal"], row["seed"], row["metrics"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is damaged; remove it to run its cell again") from error
        rows.append(row)
    return rows


def cut_torn_row(path: Path) -> None:
    """Remove a last line that a crash cut off, so that the next row begins a line."""
    with writing(path):
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_atomically(path, whole)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row in one write, on the disk before the next cell begins.

    Raises:
        UserError: it cannot be written.
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with writing(path), path.open("ab", buffering=0) as file:
        file.write(line)
        os.fsync(file.fileno())
