"""Tasks from any torchvision-style data set, made in Python."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from anomem.data.config import DataConfig, Levels
from anomem.data.convert import as_uint8, levels_for, resize, unused_range
from anomem.data.images import Picked, ResidentImages, resident_or_streamed
from anomem.data.task import FLAT, Task, assemble, class_index, stratified_split, training_rows
from anomem.validation import require


class LabelledImages(Dataset[Tensor]):
    """The images of a data set whose items are (image, label), as uint8 tensors.

    Args:
        dataset: see `task_from_dataset`.
        size: side in pixels, (H, W), or None to keep the size, which must then be one for all.
        levels: see `as_uint8`.
    """

    def __init__(self, dataset: Any, size: int | tuple[int, int] | None, levels: Levels | None = None) -> None:
        self.dataset = dataset
        self.size = size
        self.levels = levels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        """[C, H, W] uint8."""
        return resize(as_uint8(self.dataset[index][0], f"dataset[{index}]", self.levels)[None], self.size)[0]


def labels_of(dataset: Any) -> Tensor:
    """Labels [N] int64 of a data set: its `targets`, as torchvision names them, or one by one from its items."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = []
        for i in range(len(dataset)):
            item = dataset[i]
            is_pair = isinstance(item, (tuple, list)) and len(item) >= 2
            require(is_pair, f"dataset[{i}]", "a pair (image, label)", type(item).__name__)
            targets.append(item[1])
    labels = torch.as_tensor(targets)
    one_per_image = labels.dim() == 1 and not labels.is_floating_point() and len(labels) == len(dataset)
    require(one_per_image, "dataset", lambda: f"{len(dataset)} integer labels, one per image", labels)
    return labels.long()


def task_from_dataset(
    train: Any,
    test: Any = None,
    *,
    config: DataConfig,
    classes: Sequence[str] | None = None,
    aligned: bool = True,
) -> Task:
    """One class of any labelled data set against its other classes.

    Args:
        train: anything with a length whose item i is (image, label): a torchvision data set, a list of pairs. Images
            are PIL images, arrays [H, W(, C)] or tensors [C, H, W]; floating pixels are in [0, 1], or in
            `config.levels`. PIL images are treated as files are: upright, palettes as colours, no transparency.
        test: the same for testing; None splits `train` by `config.test_fraction` and seed. If `train` has one class
            only, all of it is trained on and the task has no test images.
        config: `dataset` is a free name; `normal`, `outlier_ratio`, `image_size`, `levels`, `seed`,
            `resident_megabytes` and `workers` apply.
        classes: names by label; by default the data set's `classes`, else the labels as numbers.
        aligned: whether one position means the same thing in every image; `config.aligned` overrides it.

    Raises:
        UserError: fewer than two normals, one class only, NaN in the data, an unknown class.

    Example:
        >>> config = DataConfig("mine", normal="0", image_size=64)
        >>> task = task_from_dataset(train_pairs, test_pairs, config=config)
        >>> task = dataclasses.replace(task, test_masks=masks)  # [T, H, W] bool; only to measure localisation
    """
    for name, dataset in (("train", train), ("test", test)):
        indexed = dataset is None or (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))
        hint = "give the data set of a DataLoader: loader.dataset"
        require(indexed, name, "a data set with a length, whose items have an index", type(dataset).__name__, hint)
    require(len(train) >= 2, "train", "at least two images", len(train))
    labels = labels_of(train)
    train_only = test is None and len(labels.unique()) == 1
    if train_only:
        train_rows, test_rows = torch.arange(len(labels)), torch.arange(0)
        test, test_labels = train, labels[:0]
    elif test is None:
        train_rows, test_rows = stratified_split(labels, config.test_fraction, config.seed)
        test, test_labels = train, labels[test_rows]
    else:
        train_rows = torch.arange(len(labels))
        test_labels = labels_of(test)
        test_rows = torch.arange(len(test_labels))
    if classes is None:
        classes = getattr(train, "classes", None)
    highest = int(torch.cat([labels, test_labels]).max())
    names = tuple(str(name) for name in (range(highest + 1) if classes is None else classes))
    require(highest < len(names), "classes", lambda: f"a name for each label up to {highest}", len(names))
    normal = class_index(config.normal, names)
    rows, is_normal = training_rows(labels[train_rows] == normal, config.outlier_ratio, config.seed)

    if config.levels is None:
        picked_ones = train_rows[rows].tolist()[:: max(1, len(rows) // 8)][:8]
        brightest = unused_range(train[i][0] for i in picked_ones)
        if brightest is not None and brightest >= FLAT * 65535:
            warnings.warn(
                f"{config.dataset}: images of 16 bits whose brightest value is {brightest:g} of 65535 keep few of 256 "
                f"levels of grey: set `data.levels`, in the command line {levels_for(brightest)}",
                stacklevel=2,
            )

    train_set, test_set = (
        resident_or_streamed(
            Picked(LabelledImages(source, config.image_size, config.levels), picked.tolist()),
            config.resident_megabytes,
            config.workers,
        )
        if len(picked)
        else ResidentImages(torch.empty(0, 1, 1, 1, dtype=torch.uint8))
        for source, picked in ((train, train_rows[rows]), (test, test_rows))
    )
    return assemble(
        f"{config.dataset} {names[normal]}",
        names[normal],
        train_set,
        is_normal,
        test_set,
        [names[label] for label in test_labels.tolist()],
        test_labels != normal,
        aligned=aligned if config.aligned is None else config.aligned,
        any_test=train_only,
        advice=lambda: "set `data.levels` to their values of black and white, if they have more than 8 bits",
    )
