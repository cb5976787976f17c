"""CIFAR-10 and CIFAR-100 (20 superclasses), read from the official python-version files."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from anomem.data.config import DataConfig
from anomem.data.convert import resize
from anomem.data.images import ImageSet
from anomem.data.task import Task, one_against_all
from anomem.errors import UserError

# In the order of the files' coarse labels (Krizhevsky 2009, section 3.1).
SUPERCLASSES = (
    "aquatic mammals", "fish", "flowers", "food containers", "fruit and vegetables", "household electrical devices",
    "household furniture", "insects", "large carnivores", "large man-made outdoor things",
    "large natural outdoor scenes", "large omnivores and herbivores", "medium-sized mammals",
    "non-insect invertebrates", "people", "reptiles", "small mammals", "trees", "vehicles 1", "vehicles 2",
)  # fmt: skip


def cifar10(config: DataConfig) -> Task:
    """One of ten classes against the other nine; the official training and test images."""
    train, test = (_load(CIFAR10, config, train) for train in (True, False))
    return one_against_all("cifar10", train, test, config, aligned=True)


def cifar100(config: DataConfig) -> Task:
    """One of the 20 superclasses against the other 19; the official training and test images."""
    train, test = (_load(CIFAR100, config, train) for train in (True, False))
    return one_against_all("cifar100", train, test, config, aligned=True)


def _load(kind: type[CIFAR10], config: DataConfig, train: bool) -> ImageSet:
    root = Path(config.root)
    folder = root / kind.base_folder
    for file, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")]:
        if not (folder / file).is_file():
            raise UserError(
                f"{kind.__name__}: expected the file {folder / file}, which is not there; download {kind.url} "
                f"and unpack it in {root} (or set `root` to where it lies)"
            )
    try:
        data = kind(root, train=train, download=False)
    except RuntimeError as error:
        raise UserError(
            f"{kind.__name__}: expected the official files in {folder}, but their checksums differ; "
            f"remove the folder, download {kind.url} again and unpack it in {root}"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    labels, classes = torch.tensor(data.targets), tuple(data.classes)
    if kind is CIFAR100:
        labels, classes = _coarse_labels(folder / (kind.train_list if train else kind.test_list)[0][0]), SUPERCLASSES
    return ImageSet(resize(images, config.image_size), labels, classes)


def _coarse_labels(file: Path) -> Tensor:
    """Superclass of each image, [N] int64. torchvision, which has just checked the file's sum, skips them."""
    with file.open("rb") as handle:
        return torch.tensor(pickle.load(handle, encoding="latin1")["coarse_labels"])
