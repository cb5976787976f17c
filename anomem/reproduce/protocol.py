"""Protocols: which classes, which configuration, how a sweep is scaled down, and the splits as files.

One-vs-all: one class is normal, all others are anomalous at test time. One-class (UNS) training sees normals alone;
outlier exposure (IMS) adds labelled anomalies, 1, 5 or 10% of the normals. CIFAR-10 has ten classes, CIFAR-100 its 20
superclasses.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from anomem.data import DataConfig, Images, ResidentImages, StreamedImages, Task
from anomem.data.bundled import SUPERCLASSES
from anomem.data.elpv import TYPES
from anomem.data.images import Picked
from anomem.data.task import Split
from anomem.data.textures import TEXTURES
from anomem.errors import UserError
from anomem.files import make_folder, write_atomically
from anomem.train import OptimizerConfig, TrainConfig, model_for, preset, train_stage1
from anomem.train.config import PAPER_EPOCHS
from anomem.validation import require, require_count

DataName = Literal["cifar10", "cifar100", "digits", "textures", "elpv"]
CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": tuple(str(i) for i in range(10)),
    "cifar100": tuple(str(i) for i in range(len(SUPERCLASSES))),
    "digits": tuple(str(i) for i in range(10)),
    "textures": TEXTURES,
    "elpv": TYPES,
}
"""Normal classes of each data set; a number is an index into the classes of its files."""
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": SUPERCLASSES,
}
"""Names of the classes that `CLASSES` numbers, where they may be given instead."""
RATIOS = (0.01, 0.05, 0.1)
"""Labelled anomalies per normal of outlier exposure."""
PAPER_DATA = ("cifar10", "cifar100")
FOLDERS = "folder"
"""Data of `anomem reproduce mvtec`: a folder of classes."""
PROBE = 32
"""Images of the step from which the time is estimated."""


@dataclass(frozen=True)
class Scale:
    """How an experiment is scaled down."""

    epochs: int | None = None
    """Passes over the training images in stage 1; stage 2 is shortened alike. None: those of the preset."""
    steps: int | None = None
    """Gradient steps of stage 1 instead of epochs."""
    subset: int | None = None
    """At most so many training normals, and as many test images of each kind. None: all."""

    def __post_init__(self) -> None:
        if self.epochs is not None:
            require_count(self.epochs, "epochs", 1)
        if self.steps is not None:
            require_count(self.steps, "steps", 1)
            require(self.epochs is None, "steps", "epochs or steps", "both")
        if self.subset is not None:
            require_count(self.subset, "subset", 2)


def base_config(data: str, root: str, device: str = "auto") -> TrainConfig:
    """The configuration that an experiment changes: the preset "paper" on CIFAR, elsewhere that of the data set.

    Args:
        data: name of the data set.
        root: folder with its files.
        device: as in `RunConfig.device`.
    """
    config = preset("paper" if data in PAPER_DATA else data)
    run = replace(config.run, device=device)
    return replace(config, data=replace(config.data, dataset=data, root=root), run=run)


def scaled(config: TrainConfig, scale: Scale, images: int) -> TrainConfig:
    """The configuration with as many steps as the epochs take.

    Args:
        config: of a cell.
        scale: epochs or steps.
        images: N, training images.
    """
    steps, epochs = scale.steps, scale.epochs
    if epochs is None and config.data.dataset in PAPER_DATA:
        epochs = PAPER_EPOCHS  # the preset's steps are those of CIFAR-10
    if steps is None:
        if epochs is None:
            return config
        steps = epochs * max(1, images // config.optimizer.batch_size)
    part = steps / config.optimizer.steps
    stage2 = replace(config.stage2, optimizer=shortened(config.stage2.optimizer, config.stage2.optimizer.steps * part))
    return replace(config, optimizer=shortened(config.optimizer, steps), stage2=stage2)


def shortened(config: Any, steps: float) -> Any:
    """An optimisation of another number of steps; the warm-up keeps its share.

    Args:
        config: an `OptimizerConfig`.
        steps: wanted; at least one is kept.
    """
    count = max(1, round(steps))
    return replace(config, steps=count, warmup=round(config.warmup * min(1.0, count / config.steps)))


def scaled_task(task: Task, scale: Scale, seed: int) -> Task:
    """A task of fewer images, drawn by seed; labelled anomalies keep their ratio.

    Args:
        task: on the CPU.
        scale: subset.
        seed: of the draw.
    """
    if scale.subset is None:
        return task
    source = torch.Generator().manual_seed(seed)

    def some(wanted: Tensor, count: int) -> Tensor:
        rows = wanted.nonzero().flatten()
        return rows[torch.randperm(len(rows), generator=source)[:count]]

    normals, labelled = int(task.train_is_normal.sum()), int((~task.train_is_normal).sum())
    kept = min(scale.subset, normals)
    anomalies = max(1, round(labelled * kept / normals)) if labelled else 0
    train = torch.cat([some(task.train_is_normal, kept), some(~task.train_is_normal, anomalies)])
    test = torch.cat([some(~task.test_is_anomaly, scale.subset), some(task.test_is_anomaly, scale.subset)])
    rows, names = task.rows, task.trained_on
    return replace(
        task,
        train=picked(task.train, train),
        train_is_normal=task.train_is_normal[train],
        test=picked(task.test, test),
        test_is_anomaly=task.test_is_anomaly[test],
        test_kinds=tuple(task.test_kinds[i] for i in test.tolist()),
        test_masks=None if task.test_masks is None else task.test_masks[test],
        test_paths=None if task.test_paths is None else tuple(task.test_paths[i] for i in test.tolist()),
        rows=None if rows is None else type(rows)(rows.train[train], rows.test[test]),
        trained_on=None if names is None else _kept(names, train.tolist()),
    )


def _kept(names: Split, rows: Sequence[int]) -> Split:
    """The files of some training images; normals come first."""
    every, normals = (*names.normal, *names.anomalous), len(names.normal)
    return Split(
        tuple(every[row] for row in rows if row < normals), tuple(every[row] for row in rows if row >= normals)
    )


def picked(images: Images, rows: Tensor) -> Images:
    """Some images of a set on the CPU, in a given order.

    Args:
        images: the set.
        rows: [n] int64.
    """
    if isinstance(images, StreamedImages):
        return StreamedImages(Picked(images.dataset, rows.tolist()), images.workers)
    parts = [batch for batch, _ in images.batches(rows, 1024)]
    return ResidentImages(torch.cat(parts))


def write_split(task: Task, config: DataConfig, folder: Path, named: str = "") -> Path:
    """Write which images a task consists of, so that another method can run on the same.

    A .json file with rows of the data set's files, in the order of the files, or with names of files below
    `config.root`. Where the images are drawn by a seed from photographs, a .safetensors file with the images.

    Args:
        task: on the CPU.
        config: the task was made by.
        folder: made if missing.
        named: the class in the file and in its name; `task.normal` when empty.

    Returns:
        The file.
    """
    make_folder(folder)
    exposed = f"-{config.outlier_ratio:.0%}" if config.outlier_ratio else ""
    named = named or task.normal
    name = f"{config.dataset}-{named.replace(' ', '_')}-seed{config.seed}{exposed}"
    about = {"data": config.dataset, "normal": named, "seed": config.seed, "ratio": config.outlier_ratio}
    if task.rows is None and task.test_paths is None:
        path = folder / f"{name}.safetensors"
        tensors = {"train_is_normal": task.train_is_normal, "test_is_anomaly": task.test_is_anomaly}
        for part, images in (("train", task.train), ("test", task.test)):
            tensors[part] = torch.cat([batch for batch, _ in images.batches(torch.arange(len(images)), 1024)])
        write_atomically(path, save(tensors, {key: str(value) for key, value in about.items()}))
        return path
    path, normal = folder / f"{name}.json", task.train_is_normal
    if task.rows is not None:
        rows, test = task.rows.train, task.rows.test
        parts: dict[str, Sequence[Any]] = {
            "train_normal": rows[normal].tolist(),
            "train_anomalous": rows[~normal].tolist(),
            "test_normal": test[~task.test_is_anomaly].tolist(),
            "test_anomalous": test[task.test_is_anomaly].tolist(),
        }
    else:
        trained = task.trained_on
        paths = [Path(os.path.relpath(path, config.root)).as_posix() for path in task.test_paths or ()]
        anomalous = task.test_is_anomaly.tolist()
        parts = {
            "train_normal": () if trained is None else trained.normal,
            "train_anomalous": () if trained is None else trained.anomalous,
            "test_normal": [p for p, is_anomalous in zip(paths, anomalous, strict=True) if not is_anomalous],
            "test_anomalous": [p for p, is_anomalous in zip(paths, anomalous, strict=True) if is_anomalous],
        }
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    write_atomically(path, json.dumps({**about, **parts, "sha256": digest}).encode())
    return path


def seconds_per_step(config: TrainConfig, task: Task, at_most: int | None = None) -> tuple[float, float]:
    """Time of one step of stage 1 on this machine, of the second and third of three.

    Args:
        config: whose model and batch are timed.
        task: on the device of the run.
        at_most: largest number of images in the timed step; the time is scaled up to the batch's.

    Returns:
        Wall time and processor time of this process, in seconds.

    Raises:
        UserError: fewer than two images.
    """
    if len(task.train) < 2:
        raise UserError(f"{task.name}: expected at least two training images, found {len(task.train)}")
    batch = min(config.optimizer.batch_size, len(task.train))
    timed = batch if at_most is None else min(batch, at_most)
    model = model_for(config, task)
    short = OptimizerConfig(steps=1, batch_size=timed, warmup=0, learning_rate=config.optimizer.learning_rate)
    quick = replace(config, optimizer=short, run=replace(config.run, log_every=10))
    train_stage1(model, task.train, None, quick, quiet=True)
    wall, busy = time.perf_counter(), time.process_time()
    train_stage1(model, task.train, None, replace(quick, optimizer=replace(short, steps=2)), quiet=True)
    if task.train_is_normal.device.type == "cuda":
        torch.cuda.synchronize()
    factor = batch / timed / 2
    return (time.perf_counter() - wall) * factor, (time.process_time() - busy) * factor


def folder_classes(root: str) -> tuple[str, ...]:
    """The classes of a folder: MVTec-AD's, MVTec LOCO's or VisA's, each in a folder of its name.

    Args:
        root: the folder.

    Raises:
        UserError: it cannot be read, or holds no class.
    """
    folder = Path(root)
    try:
        found = sorted(p.name for p in folder.iterdir() if (p / "train").is_dir() or (p / "Data" / "Images").is_dir())
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    if not found:
        one = (folder / "train").is_dir() or (folder / "Data" / "Images").is_dir()
        hint = f"; it is one class itself: give {folder.resolve().parent}" if one else ""
        raise UserError(
            f"`data.root`: expected folders of classes with train/ (MVTec) or Data/Images (VisA) in {folder}, "
            f"found none{hint}"
        )
    return tuple(found)
