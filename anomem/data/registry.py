"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from anomem.data.cifar import cifar10, cifar100
from anomem.data.config import DataConfig, check_image_size
from anomem.data.digits import digits
from anomem.data.folder import folder
from anomem.data.task import Task
from anomem.data.textures import textures
from anomem.validation import require_choice

DATASETS: dict[str, Callable[[DataConfig], Task]] = {
    "digits": digits,
    "textures": textures,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": folder,
}


def load_task(config: DataConfig) -> Task:
    """The task a configuration describes, its images on the CPU (`Task.to` moves them).

    Raises:
        UserError: an unknown data set or class, missing or unreadable files, one class only.
    """
    require_choice(config.dataset, "dataset", tuple(DATASETS))
    check_image_size(config)
    return DATASETS[config.dataset](config)
