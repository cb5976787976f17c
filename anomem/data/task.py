"""A task: normal images to train on, normal and anomalous ones to test on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from anomem.data.config import DataConfig
from anomem.data.images import Images, ImageSet, ResidentImages, channel_statistics
from anomem.errors import ArgumentError, UserError
from anomem.validation import require

FLAT = 32 / 255
"""Training images whose brightnesses span less than this are nearly constant."""


class Split(NamedTuple):
    """The files that a run was trained on, relative to the root of its data."""

    normal: tuple[str, ...]
    """Normal images."""
    anomalous: tuple[str, ...]
    """Labelled anomalies."""


class Rows(NamedTuple):
    """Which images of a data set a task consists of, so that another method can run on the same."""

    train: Tensor
    """[N] int64 into the training images of its files, in the order of `Task.train`."""
    test: Tensor
    """[T] int64 into the test images of its files, in the order of `Task.test`."""


@dataclass
class Task:
    """Training and test images with their labels.

    Attributes:
        name: data set and normal class, "digits 3".
        normal: name of the normal class.
        train: N training images.
        train_is_normal: [N] bool; all True in the one-class setting, False for labelled anomalies.
        test: T test images.
        test_is_anomaly: [T] bool.
        test_kinds: class or defect of each test image, T names.
        test_masks: [T, H, W] bool, True on anomalous pixels; None where only images are labelled.
        mean: of each channel over training normals, in [0, 1].
        std: of each channel over training normals, > 0.
        aligned: whether a position means the same in every image.
        test_paths: file of each test image, or None.
        trained_on: files of the training images, or None; `load_task` takes it to give the same split again.
        rows: which images of the data set these are, or None where they are named by files or made by a seed.

    Example:
        >>> task = load_task(DataConfig("digits", normal="3"))
        >>> len(task.train), len(task.test), int(task.test_is_anomaly.sum())
        (128, 539, 484)
    """

    name: str
    normal: str
    train: Images
    train_is_normal: Tensor
    test: Images
    test_is_anomaly: Tensor
    test_kinds: tuple[str, ...]
    test_masks: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aligned: bool
    test_paths: tuple[str, ...] | None = None
    trained_on: Split | None = None
    rows: Rows | None = None

    def to(self, device: torch.device | str) -> Task:
        """The same task on another device: labels and masks moved, images delivered there."""
        return replace(
            self,
            train=self.train.to(device),
            train_is_normal=self.train_is_normal.to(device),
            test=self.test.to(device),
            test_is_anomaly=self.test_is_anomaly.to(device),
            test_masks=None if self.test_masks is None else self.test_masks.to(device),
        )


def assemble(
    name: str,
    normal: str,
    train: Images,
    train_is_normal: Tensor,
    test: Images,
    test_kinds: Sequence[str],
    test_is_anomaly: Tensor,
    *,
    aligned: bool,
    test_masks: Tensor | None = None,
    test_paths: Sequence[str] | None = None,
    trained_on: Split | None = None,
    rows: Rows | None = None,
    any_test: bool = False,
    fewest: int = 2,
    advice: Callable[[], str] = lambda: "check what is in them",
) -> Task:
    """Check a task's parts and measure the channel statistics of its training normals.

    Args:
        name: data set and normal class, "digits 3".
        normal: name of the normal class.
        train: N images, all normals first.
        train_is_normal: [N] bool.
        test: T images.
        test_kinds: T names.
        test_is_anomaly: [T] bool.
        aligned: see `Task`.
        test_masks: [T, H, W] bool or None.
        test_paths: T files or None.
        trained_on: see `Task`.
        rows: see `Task`.
        any_test: the task may have no test images, or those of one class only.
        fewest: training normals.
        advice: what to do about nearly constant training images.

    Raises:
        UserError: too few training normals, or only one class among the test images.
    """
    normals = int(train_is_normal.sum())
    if normals < fewest:
        wanted = "two normal training images" if fewest == 2 else "one normal image"
        raise UserError(f"{name}: expected at least {wanted}, found {normals}; add images or name another normal class")
    anomalies = int(test_is_anomaly.sum())
    if not any_test and anomalies in (0, len(test)):
        only = "normal" if anomalies == 0 else "anomalous"
        raise UserError(
            f"{name}: expected normal and anomalous test images, found {len(test)} of one class only ({only}); "
            "add test images of the other"
        )
    mean, std, spread = channel_statistics(train, normals)
    if spread < FLAT:
        warnings.warn(
            f"{name}: the training images are nearly constant: their brightnesses span {round(spread * 255)} of 255 "
            f"levels; {advice()}",
            stacklevel=2,
        )
    return Task(
        name=name,
        normal=normal,
        train=train,
        train_is_normal=train_is_normal,
        test=test,
        test_is_anomaly=test_is_anomaly,
        test_kinds=tuple(test_kinds),
        test_masks=test_masks,
        mean=mean,
        std=std,
        aligned=aligned,
        test_paths=None if test_paths is None else tuple(test_paths),
        trained_on=trained_on,
        rows=rows,
    )


def one_against_all(name: str, train: ImageSet, test: ImageSet, config: DataConfig, *, aligned: bool) -> Task:
    """One class normal, every other anomalous at test time; labelled anomalies join training by ratio.

    Args:
        name: of the data set.
        train: labelled training images.
        test: labelled test images of the same classes.
        config: normal class, ratio of labelled anomalies, seed.
        aligned: the data set's own answer; `config.aligned` overrides it.
    """
    normal = class_index(config.normal, train.classes)
    rows, is_normal = training_rows(train.labels == normal, config.outlier_ratio, config.seed)
    return assemble(
        f"{name} {train.classes[normal]}",
        train.classes[normal],
        ResidentImages(train.images[rows]),
        is_normal,
        ResidentImages(test.images),
        [test.classes[label] for label in test.labels.tolist()],
        test.labels != normal,
        aligned=aligned if config.aligned is None else config.aligned,
        rows=Rows(
            rows if train.rows is None else train.rows[rows],
            torch.arange(len(test.images)) if test.rows is None else test.rows,
        ),
    )


def training_rows(is_normal: Tensor, outlier_ratio: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which rows to train on: every normal, then labelled anomalies drawn by seed.

    Args:
        is_normal: [N] bool.
        outlier_ratio: labelled anomalies as a ratio ≥ 0 of the normals.
        seed: of the draw.

    Returns:
        Rows [n] int64, normals first, and whether each is normal [n] bool.

    Raises:
        ArgumentError: more labelled anomalies than there are.
    """
    normals = is_normal.nonzero().flatten()
    anomalies = (~is_normal).nonzero().flatten()
    wanted = outlier_count(len(normals), outlier_ratio, len(anomalies))
    labelled = anomalies[torch.randperm(len(anomalies), generator=generator(seed))[:wanted]]
    rows = torch.cat([normals, labelled])
    return rows, torch.arange(len(rows)) < len(normals)


def outlier_count(normals: int, ratio: float, available: int) -> int:
    """Number of labelled anomalies for a ratio ≥ 0 of the normals; at least one for a ratio > 0."""
    wanted = max(1, round(normals * ratio)) if ratio > 0 else 0
    require(
        wanted <= available,
        "data.outlier_ratio",
        lambda: f"at most {available / max(normals, 1):.3g} ({available} anomalies for {normals} normals)",
        lambda: f"{ratio} ({wanted} anomalies)",
    )
    return wanted


def stratified_split(labels: Tensor, test_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split every class by the same fraction.

    Args:
        labels: [N] int64.
        test_fraction: in (0, 1).
        seed: of the draw.

    Returns:
        Sorted rows to train on and to test on, int64.
    """
    source = generator(seed)
    train, test = [], []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=source)]
        held_out = round(len(rows) * test_fraction)
        test.append(rows[:held_out])
        train.append(rows[held_out:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def class_index(name: str, classes: Sequence[str]) -> int:
    """Index of a class given by name or, if no class has that name, by number.

    Raises:
        ArgumentError: no such class; the message lists them.
    """
    if name in classes:
        return list(classes).index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise ArgumentError("data.normal", f"one of {', '.join(classes)} or an index below {len(classes)}", repr(name))


def generator(seed: int) -> torch.Generator:
    """A new CPU generator, so that a split does not depend on earlier random numbers."""
    return torch.Generator().manual_seed(seed)
