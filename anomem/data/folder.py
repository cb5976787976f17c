"""Images on disk: `train/<normal>`, `test/<kind>` and, for localisation, `ground_truth/<kind>`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anomem.data.config import DataConfig
from anomem.data.convert import as_uint8, resize, resize_masks
from anomem.data.images import ResidentImages, resident_or_streamed
from anomem.data.task import Task, assemble, class_index, generator, outlier_count
from anomem.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
GOOD = ("good", "normal", "ok")


class ImageFiles(Dataset[Tensor]):
    """Image files, read when asked for.

    Args:
        paths: the files.
        size: side in pixels, or (H, W), every image is resized to (the aspect ratio is not kept).
        grey: one channel instead of three.
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
    """The image files of a folder in the order of their names; hidden ones (macOS leaves `._` files) are none.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"expected a folder of images at {folder}, which is not there; create it or set `root`")
    seen = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    found = sorted(path for path in seen if not path.is_dir())
    if not found:
        raise UserError(f"{folder}: expected image files ({', '.join(SUFFIXES)}), found none; add some")
    return found


def folder(config: DataConfig) -> Task:
    """Images on disk in the layout of MVTec-AD.

    `train/<normal>` holds normal images. Of the folders in `test`, the one named like the normal class (or "good",
    "normal", "ok") holds normal ones, every other is a kind of anomaly. With `outlier_ratio`, labelled anomalies are
    drawn from `test` by seed and are not tested on. If there is a folder `ground_truth`, every anomalous image needs a
    mask there: `ground_truth/<kind>/<name>.png` or `<name>_mask.png`, anything but black is anomalous.

    Without a folder `test` the task has no test images: enough to train on and to score files with.
    """
    root, size = Path(config.root), 128 if config.image_size is None else config.image_size
    normal = _normal_folder(root / "train", config.normal)
    train = image_files(root / "train" / normal)
    kinds = _subfolders(root / "test") if (root / "test").exists() else []
    test = [(path, kind) for kind in kinds for path in image_files(root / "test" / kind)]
    odd = [kind != normal and kind not in GOOD for _, kind in test]
    anomalies = [i for i, is_anomaly in enumerate(odd) if is_anomaly]
    wanted = outlier_count(len(train), config.outlier_ratio, len(anomalies))
    drawn = {anomalies[i] for i in torch.randperm(len(anomalies), generator=generator(config.seed))[:wanted].tolist()}
    kept = [i for i in range(len(test)) if i not in drawn]
    files = [*train, *(test[i][0] for i in sorted(drawn))]
    tested = [test[i][0] for i in kept]
    is_anomaly = torch.tensor([odd[i] for i in kept], dtype=torch.bool)
    masks = None
    if test and (root / "ground_truth").is_dir():
        marks = [_mask(root, path, kind, size) if odd[i] else None for i, (path, kind) in enumerate(test)]
        blank = torch.zeros(size, size, dtype=torch.bool)
        masks = torch.stack([blank if (mask := marks[i]) is None else mask for i in kept])

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
        is_anomaly,
        aligned=config.aligned is not False,
        test_masks=masks,
        test_paths=[str(path) for path in tested],
        train_only=not test,
    )


def read_image(path: Path, grey: bool = False) -> Tensor:
    """One image file as pixels: upright by its EXIF note, transparency dropped, 16 bits brought to 8.

    Args:
        path: the file.
        grey: one channel instead of three.

    Returns:
        [C, H, W] uint8.

    Raises:
        UserError: the file cannot be read, or holds numbers that are no brightness: floating ones outside of [0, 1],
            integers of 32 bits.
    """
    pixels = as_uint8(_read(path, "L" if grey else "RGB"), str(path))
    return pixels if grey or len(pixels) == 3 else pixels.expand(3, -1, -1)


def _read(path: Path, mode: str) -> Image.Image:
    """The image upright, in the mode; one of more than 8 bits in its own, as PIL's conversion cuts off at 255."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright if upright.mode.startswith(("I", "F")) else upright.convert(mode)
    # PIL raises these for what is not an image, and SyntaxError for some broken PNG files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected a readable image ({error}); repair or remove the file") from error


def _mask(root: Path, image: Path, kind: str, size: int) -> Tensor:
    """[size, size] bool."""
    truth = root / "ground_truth" / kind
    for name in (f"{image.stem}.png", f"{image.stem}_mask.png"):
        if (truth / name).is_file():
            marked = np.asarray(_read(truth / name, "L")) > 0
            return resize_masks(torch.from_numpy(marked)[None], size)[0]
    raise UserError(
        f"{truth}: expected the mask of {image.name} as {image.stem}.png or {image.stem}_mask.png, found neither; "
        "add it, or remove the folder ground_truth to go without masks"
    )


def _subfolders(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"expected folders of images in {folder}, found none; the layout is train/<normal> and test/<kind>, "
            "where test holds normal images (test/good) and anomalous ones"
        )
    return found


def _normal_folder(folder: Path, name: str) -> str:
    found = _subfolders(folder)
    return found[0] if len(found) == 1 else found[class_index(name, found)]
