"""Images in folders: `train/<normal>`, `test/<kind>` and, for localisation, `ground_truth/<kind>`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from anomem.data.config import DataConfig
from anomem.data.convert import read_image, read_mask, resize, resize_masks
from anomem.data.images import ResidentImages, resident_or_streamed
from anomem.data.task import Task, assemble, class_index, generator, outlier_count
from anomem.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
GOOD = ("good", "normal", "ok")


class ImageFiles(Dataset[Tensor]):
    """Image files, each read when it is indexed.

    Args:
        paths: the files.
        size: side in pixels, or (H, W); images are resized to it and the aspect ratio is not kept.
        grey: one channel instead of three.

    Example:
        >>> images = StreamedImages(ImageFiles(image_files(Path("photos")), size=128))
        >>> for batch, index in images.batches(torch.arange(len(images)), batch_size=64):
        ...     scorer(batch)  # [64, 3, 128, 128] uint8
    """

    def __init__(self, paths: Sequence[Path], size: int | tuple[int, int], grey: bool = False) -> None:
        self.paths = paths
        self.size = size
        self.grey = grey

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """[C, H, W] uint8."""
        return resize(read_image(self.paths[index], self.grey)[None], self.size)[0]


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder in the order of their names; hidden files (macOS `._*`) are skipped.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"expected a folder of images at {folder}, which is not there; create it or set `data.root`")
    found = [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: expected image files ({', '.join(SUFFIXES)}), found none; add some")
    return found


def folder_task(config: DataConfig) -> Task:
    """Images in folders with the layout of MVTec-AD.

    `train/<normal>` holds normal images. In `test` the folder named like the normal class (or "good", "normal", "ok")
    holds normal images; every other folder is a kind of anomaly. With `outlier_ratio`, labelled anomalies are drawn
    from `test` by seed and are not tested on. If there is a folder `ground_truth`, every anomalous image needs a mask:
    `ground_truth/<kind>/<name>.png` or `<name>_mask.png`, where every pixel that is not black is anomalous.

    Without a folder `test` the task has no test images: enough to train on and to score files with.
    """
    root, size = Path(config.root), 128 if config.image_size is None else config.image_size
    normal = _normal_folder(root / "train", config.normal)
    train = image_files(root / "train" / normal)
    kinds = _subfolders(root / "test") if (root / "test").exists() else []
    test = [(path, kind) for kind in kinds for path in image_files(root / "test" / kind)]
    anomalous = [kind != normal and kind not in GOOD for _, kind in test]
    anomalies = [i for i, is_anomaly in enumerate(anomalous) if is_anomaly]
    wanted = outlier_count(len(train), config.outlier_ratio, len(anomalies))
    order = torch.randperm(len(anomalies), generator=generator(config.seed))
    labelled = {anomalies[i] for i in order[:wanted].tolist()}
    kept = [i for i in range(len(test)) if i not in labelled]
    files = [*train, *(test[i][0] for i in sorted(labelled))]
    tested = [test[i][0] for i in kept]
    masks = None
    if test and (root / "ground_truth").is_dir():
        blank = torch.zeros(size, size, dtype=torch.bool)
        every = [_mask(root, *test[i], size) if anomalous[i] else blank for i in range(len(test))]
        masks = torch.stack([every[i] for i in kept])

    train_set, test_set = (
        resident_or_streamed(ImageFiles(paths, size, config.grey), config.resident_megabytes, config.workers)
        if paths
        else ResidentImages(torch.empty(0, 1 if config.grey else 3, size, size, dtype=torch.uint8))
        for paths in (files, tested)
    )
    return assemble(
        f"{root.name} {normal}",
        normal,
        train_set,
        torch.arange(len(files)) < len(train),
        test_set,
        [test[i][1] for i in kept],
        torch.tensor([anomalous[i] for i in kept], dtype=torch.bool),
        aligned=config.aligned is not False,
        test_masks=masks,
        test_paths=[str(path) for path in tested],
        train_only=not test,
    )


def _mask(root: Path, image: Path, kind: str, size: int) -> Tensor:
    """[size, size] bool."""
    folder = root / "ground_truth" / kind
    for name in (f"{image.stem}.png", f"{image.stem}_mask.png"):
        if (folder / name).is_file():
            return resize_masks(read_mask(folder / name)[None], size)[0]
    raise UserError(
        f"{folder}: expected the mask of {image.name} as {image.stem}.png or {image.stem}_mask.png, found neither; "
        "add it, or remove the folder ground_truth to go without masks"
    )


def _normal_folder(folder: Path, name: str) -> str:
    found = _subfolders(folder)
    return found[0] if len(found) == 1 else found[class_index(name, found)]


def _subfolders(folder: Path) -> list[str]:
    found = [path.name for path in _entries(folder) if path.is_dir()] if folder.is_dir() else []
    if not found:
        raise UserError(
            f"expected folders of images in {folder}, found none; the layout is train/<normal> and test/<kind>, "
            "where test holds normal images (test/good) and anomalous ones"
        )
    return found


def _entries(folder: Path) -> list[Path]:
    """Everything in a folder, in the order of names."""
    return sorted(folder.iterdir())
