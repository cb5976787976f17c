"""Images and tasks: which class is normal, what is trained on, what is tested."""

from anomem.data.config import DataConfig
from anomem.data.custom import task_from_dataset
from anomem.data.folder import ImageFiles, image_files, read_image
from anomem.data.images import Images, ImageSet, ResidentImages, StreamedImages
from anomem.data.registry import DATASETS, load_task
from anomem.data.task import Task

__all__ = [
    "DATASETS",
    "DataConfig",
    "ImageFiles",
    "ImageSet",
    "Images",
    "ResidentImages",
    "StreamedImages",
    "Task",
    "image_files",
    "load_task",
    "read_image",
    "task_from_dataset",
]
