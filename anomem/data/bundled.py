"""Data sets in packages or official files: scikit-learn's digits, CIFAR-10 and CIFAR-100 (20 superclasses)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.data.config import DataConfig
from anomem.data.convert import resize
from anomem.data.images import ImageSet
from anomem.data.task import Task, one_against_all, stratified_split
from anomem.errors import UserError, optional

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

# In the order of the files' coarse labels (Krizhevsky 2009, section 3.1).
SUPERCLASSES = (
    "aquatic mammals", "fish", "flowers", "food containers", "fruit and vegetables", "household electrical devices",
    "household furniture", "insects", "large carnivores", "large man-made outdoor things",
    "large natural outdoor scenes", "large omnivores and herbivores", "medium-sized mammals",
    "non-insect invertebrates", "people", "reptiles", "small mammals", "trees", "vehicles 1", "vehicles 2",
)  # fmt: skip


def load_digits(size: int | tuple[int, int] = 16) -> ImageSet:
    """All 1797 digits, upsampled bilinearly from 8×8 pixels.

    Args:
        size: side in pixels, or (H, W).

    Returns:
        Images [1797, 1, H, W] uint8 of ten classes.
    """
    with optional("the data set digits"):
        from sklearn.datasets import load_digits as load_8x8

    data = load_8x8()
    images = torch.from_numpy(data.images).float()[:, None] / 16  # ink from 0 to 16
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    pixels = (images * 255).round().to(torch.uint8)
    return ImageSet(pixels, torch.from_numpy(data.target).long(), tuple(str(digit) for digit in range(10)))


def digits_task(config: DataConfig) -> Task:
    """One digit against the nine others, each class split by `test_fraction` and seed."""
    everything = load_digits(16 if config.image_size is None else config.image_size)
    train, test = (
        ImageSet(everything.images[rows], everything.labels[rows], everything.classes, rows)
        for rows in stratified_split(everything.labels, config.test_fraction, config.seed)
    )
    return one_against_all("digits", train, test, config, aligned=True)


def cifar10_task(config: DataConfig) -> Task:
    """One of ten classes against the other nine; the official training and test images."""
    from torchvision.datasets import CIFAR10

    train, test = (_load_cifar(CIFAR10, config, train) for train in (True, False))
    return one_against_all("cifar10", train, test, config, aligned=True)


def cifar100_task(config: DataConfig) -> Task:
    """One of the 20 superclasses against the other 19; the official training and test images."""
    from torchvision.datasets import CIFAR100

    train, test = (_load_cifar(CIFAR100, config, train) for train in (True, False))
    for images, files in ((train, CIFAR100.train_list), (test, CIFAR100.test_list)):
        images.labels = _coarse_labels(Path(config.root) / CIFAR100.base_folder / files[0][0])
        images.classes = SUPERCLASSES
    return one_against_all("cifar100", train, test, config, aligned=True)


def _load_cifar(kind: type[CIFAR10], config: DataConfig, train: bool) -> ImageSet:
    """The official training or test images with their fine labels."""
    from torchvision.datasets.utils import check_integrity

    root = Path(config.root)
    folder = root / kind.base_folder
    if not folder.exists() and (root / kind.filename).is_file():
        whole = check_integrity(str(root / kind.filename), kind.tgz_md5)
        state = "it is whole: unpack it there" if whole else f"it is incomplete or damaged: download {kind.url} again"
        raise UserError(f"{kind.__name__}: expected the folder {folder}, found the archive {kind.filename}; {state}")
    for file, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")]:
        if not (folder / file).is_file():
            raise UserError(
                f"{kind.__name__}: expected the file {folder / file}, which is not there; download {kind.url} "
                f"and unpack it in {root} (or set `data.root` to the folder that holds it)"
            )
    try:
        data = kind(root, train=train, download=False)
    except RuntimeError as error:
        raise UserError(
            f"{kind.__name__}: expected the official files in {folder}, but their checksums differ; "
            f"remove the folder, download {kind.url} again and unpack it in {root}"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(resize(images, config.image_size), torch.tensor(data.targets), tuple(data.classes))


def _coarse_labels(file: Path) -> Tensor:
    """Superclass of each image, [N] int64. torchvision has just checked the file's checksum but drops these labels."""
    with file.open("rb") as handle:
        return torch.tensor(pickle.load(handle, encoding="latin1")["coarse_labels"])
