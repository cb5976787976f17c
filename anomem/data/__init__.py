"""Images and tasks: which class is normal, which images train, which test."""

from __future__ import annotations

from collections.abc import Callable

from anomem.data.bundled import cifar10_task, cifar100_task, digits_task
from anomem.data.config import DataConfig, Dataset
from anomem.data.convert import read_image, upright_size
from anomem.data.custom import task_from_dataset
from anomem.data.elpv import elpv
from anomem.data.folder import ImageFiles, folder_task, image_files
from anomem.data.images import Images, ImageSet, ResidentImages, StreamedImages
from anomem.data.task import Rows, Split, Task
from anomem.data.textures import textures_task
from anomem.validation import require_choice

__all__ = [
    "DATASETS",
    "DataConfig",
    "Dataset",
    "ImageFiles",
    "ImageSet",
    "Images",
    "ResidentImages",
    "Rows",
    "Split",
    "StreamedImages",
    "Task",
    "image_files",
    "load_task",
    "read_image",
    "task_from_dataset",
    "upright_size",
]

DATASETS: dict[str, Callable[[DataConfig], Task]] = {
    "digits": digits_task,
    "textures": textures_task,
    "cifar10": cifar10_task,
    "cifar100": cifar100_task,
    "folder": folder_task,
    "elpv": elpv,
}


def load_task(config: DataConfig, trained_on: Split | None = None, *, fewest: int = 2) -> Task:
    """The task of a configuration, with its images on the CPU (`Task.to` moves them).

    Args:
        config: of the task.
        trained_on: of a folder, the files an earlier run was trained on (`Task.trained_on`): they are trained on
            again, and none of them is tested on, whatever was added to the folder since.
        fewest: of a folder, normal images: 1 where nothing is trained.

    Raises:
        UserError: an unknown data set or class, missing or unreadable files, one class only.
    """
    require_choice(config.dataset, "data.dataset", tuple(DATASETS))
    if config.dataset == "folder":
        return folder_task(config, trained_on, fewest)
    return DATASETS[config.dataset](config)
