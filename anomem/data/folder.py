"""Images in folders: the layouts of MVTec-AD, MVTec LOCO and VisA, with masks for localisation."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anomem.data.config import MEGAPIXELS, DataConfig, Levels
from anomem.data.convert import levels_for, opened, read_image, read_mask, resize_masks, unused_range, upright_size
from anomem.data.frame import box_of, framed, height_and_width
from anomem.data.images import ResidentImages, resident_or_streamed
from anomem.data.task import FLAT, Split, Task, assemble, generator, outlier_count, stratified_split
from anomem.errors import ArgumentError, UserError
from anomem.validation import require

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
GOOD = ("good", "normal", "ok")
# What archives, network drives and Windows leave in folders, beside the names that begin with a dot.
SERVICE = ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "system volume information")


class ImageFiles(Dataset[Tensor]):
    """Image files, each read when it is indexed.

    Args:
        paths: the files.
        size: side in pixels, or (H, W).
        grey: one channel instead of three.
        letterbox: keep the aspect ratio and repeat the border pixels around the image; else stretch it.
        levels: values of black and white in files of more than 8 bits; see `DataConfig.levels`.
        max_megapixels: the most pixels a file may have, in millions.

    Example:
        >>> images = StreamedImages(ImageFiles(image_files(Path("photos")), size=128))
        >>> for batch, index in images.batches(torch.arange(len(images)), batch_size=64):
        ...     scorer(batch)  # [64, 3, 128, 128] uint8
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int | tuple[int, int],
        grey: bool = False,
        *,
        letterbox: bool = False,
        levels: Levels | None = None,
        max_megapixels: float = MEGAPIXELS,
    ) -> None:
        self.paths = paths
        self.size = height_and_width(size)
        self.grey = grey
        self.letterbox = letterbox
        self.levels = levels
        self.max_megapixels = max_megapixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """[C, H, W] uint8."""
        image = read_image(self.paths[index], self.grey, levels=self.levels, max_megapixels=self.max_megapixels)
        return framed(image[None], self.size, self.letterbox)[0]


class Listing(NamedTuple):
    """The images of a layout, before the split."""

    normal: str
    """Name of the normal class."""
    train: list[Path]
    """Normal images to train on."""
    test: list[tuple[Path, str, bool]]
    """File, kind and whether it is anomalous."""
    masks: Path | None
    """Folder of the masks, one folder for each kind in it."""


def image_files(folder: Path, setting: str = "data.root") -> list[Path]:
    """The image files of a folder in the order of their names; hidden ones (macOS `._*`) are skipped.

    Args:
        folder: of images.
        setting: that names it.

    Raises:
        UserError: no such folder, one that cannot be listed, or no image in it.
    """
    if not os.path.isdir(folder):
        advice = f"create it or correct `{setting}`"
        raise UserError(f"expected a folder of images at {folder}, which is not there; {advice}")
    entries = _entries(folder)
    found = [path for path in entries if path.suffix.lower() in SUFFIXES and not os.path.isdir(path)]
    if not found:
        within = [path.name for path in entries if os.path.isdir(path)]
        shown = ", ".join(within[:3]) + (", …" if len(within) > 3 else "")
        rest = f" (folders in it are not searched); add some, or name one of these: {shown}" if within else "; add some"
        raise UserError(f"{folder}: expected image files ({', '.join(SUFFIXES)}), found none{rest}")
    return found


def image_trees(folder: Path) -> list[Path]:
    """The image files of a folder and of all folders below it, as `image_files`; links to folders are not followed.

    Raises:
        UserError: as `image_files`.
    """
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        entries = _entries(here)
        found += [path for path in entries if path.suffix.lower() in SUFFIXES and not os.path.isdir(path)]
        waiting += [path for path in reversed(entries) if os.path.isdir(path) and not os.path.islink(path)]
    if not found:
        raise UserError(f"{folder}: expected image files ({', '.join(SUFFIXES)}) in it or below, found none; add some")
    return found


def folder_task(config: DataConfig, trained_on: Split | None = None, fewest: int = 2) -> Task:
    """Images in folders with the layout of MVTec-AD, MVTec LOCO or VisA.

    `train/<normal>` holds normal images. In `test` the folders named like the normal class, or "good", "normal" or "ok"
    in any case, hold normal images; every other folder is a kind of anomaly. Hidden and service folders are skipped.
    With `outlier_ratio`, labelled anomalies are drawn from `test` by seed and are not tested on. If there is a folder
    `ground_truth`, every anomalous image needs a mask: `ground_truth/<kind>/<name>.png` or `<name>_mask.png` (or .bmp,
    .tif, …), or a folder `ground_truth/<kind>/<name>` of masks, as in MVTec LOCO; see `read_mask`.

    The layout of VisA is `Data/Images/{Normal,Anomaly}` with `Data/Masks/Anomaly`, split by `../split_csv/1cls.csv`
    where there is one, else by `test_fraction` and seed.

    A folder without `train` that holds images itself, or a folder "good", "normal" or "ok" of them, is one of normal
    images; `test` and `ground_truth` may lie beside them.

    Without test images the task is enough to train on and to score files with.

    Args:
        config: of the task.
        trained_on: see `load_task`.
        fewest: see `load_task`.
    """
    root, size = Path(config.root), height_and_width(128 if config.image_size is None else config.image_size)
    if not os.path.isdir(root):
        found = "which is a file" if root.is_file() else "which is not there"
        raise UserError(f"expected a folder of images at {root}, {found}; create it or correct `data.root`")
    layout = _visa if os.path.isdir(root / "Data" / "Images") else _flat if _is_flat(root) else _mvtec
    listing = layout(root, config, trained_on)
    train, labelled = _split(listing, root, config, trained_on)
    test = [entry for entry in listing.test if entry[0] not in labelled]
    masks = None
    if test and listing.masks is not None:
        masks = _masks(listing.masks, test, size, config)
    anomalous = [is_anomalous for _, _, is_anomalous in test]
    name = f"{root.resolve().name} {listing.normal}"
    if test and len(set(anomalous)) == 1:
        missing = "anomalous" if not anomalous[0] else "normal"
        warnings.warn(f"{name}: there are no {missing} test images, so that nothing can be measured", stacklevel=2)

    files = [*train, *labelled]
    if config.levels is None:
        warn_of_unused_range(train, config.max_megapixels, FLAT)  # darker ones are nearly constant: `assemble` says so
    train_set, test_set = (
        resident_or_streamed(
            ImageFiles(
                paths,
                size,
                config.grey,
                letterbox=config.letterbox,
                levels=config.levels,
                max_megapixels=config.max_megapixels,
            ),
            config.resident_megabytes,
            config.workers,
        )
        if paths
        else ResidentImages(torch.empty(0, 1 if config.grey else 3, *size, dtype=torch.uint8))
        for paths in (files, [path for path, _, _ in test])
    )
    return assemble(
        name,
        listing.normal,
        train_set,
        torch.arange(len(files)) < len(train),
        test_set,
        [kind for _, kind, _ in test],
        torch.tensor(anomalous, dtype=torch.bool),
        aligned=config.aligned is not False,
        test_masks=masks,
        test_paths=[str(path) for path, _, _ in test],
        trained_on=Split(*(tuple(_relative(path, root) for path in paths) for paths in (train, labelled))),
        any_test=True,
        fewest=fewest,
        advice=lambda: _advice(train[:16], config),
    )


def _is_flat(root: Path) -> bool:
    """Whether a folder holds normal images without the folder `train`."""
    if not os.path.isdir(root) or os.path.isdir(root / "train"):
        return False
    return _good_folder(root) is not None or any(p.suffix.lower() in SUFFIXES for p in _entries(root))


def _good_folder(root: Path) -> Path | None:
    """The only folder of a name for normal images, or None."""
    found = [path for path in _entries(root) if path.name.casefold() in GOOD and os.path.isdir(path)]
    return found[0] if len(found) == 1 else None


def _flat(root: Path, config: DataConfig, trained_on: Split | None) -> Listing:
    good = _good_folder(root)
    normal = root.resolve().name if good is None else good.name
    known = {"", "0", normal.casefold(), *(GOOD if good is not None else ())}
    expected = f"{normal}, the only folder of images in {root.absolute()}" if good else f"{normal}, the folder itself"
    require(config.normal.casefold() in known, "data.normal", expected, repr(config.normal))
    return _listing(root, normal, image_files(good or root))


def _mvtec(root: Path, config: DataConfig, trained_on: Split | None) -> Listing:
    normal = _normal_folder(root / "train", config.normal)
    return _listing(root, normal, image_files(root / "train" / normal))


def _listing(root: Path, normal: str, train: list[Path]) -> Listing:
    """With the folders `test` and `ground_truth` of MVTec-AD, where they are there."""
    kinds = _subfolders(root / "test") if os.path.isdir(root / "test") else []
    good = {normal.casefold(), *GOOD}
    test = [(path, kind, kind.casefold() not in good) for kind in kinds for path in image_files(root / "test" / kind)]
    masks = root / "ground_truth"
    return Listing(normal, train, test, masks if os.path.isdir(masks) else None)


def _visa(root: Path, config: DataConfig, trained_on: Split | None) -> Listing:
    images = root / "Data" / "Images"
    masks = root / "Data" / "Masks"
    table = root.absolute().parent / "split_csv" / "1cls.csv"
    normals, anomalies = image_files(images / "Normal"), []
    if os.path.isdir(images / "Anomaly"):
        anomalies = image_files(images / "Anomaly")
    if trained_on is not None:
        known = set(trained_on.normal)
        train = [path for path in normals if _relative(path, root) in known]
    elif table.is_file():
        try:
            rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
            names = {Path(row["image"]).name for row in rows if (row["object"], row["split"]) == (root.name, "train")}
        except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
            raise UserError(f"{table}: expected a table with object, split and image ({error})") from error
        train = [path for path in normals if path.name in names]
    else:
        rows_to_train, _ = stratified_split(torch.zeros(len(normals)), config.test_fraction, config.seed)
        train = [normals[i] for i in rows_to_train.tolist()]
    kept = set(train)
    test = [(path, "normal", False) for path in normals if path not in kept]
    test += [(path, "Anomaly", True) for path in anomalies]
    return Listing("normal", train, test, masks if os.path.isdir(masks) else None)


def _split(listing: Listing, root: Path, config: DataConfig, trained_on: Split | None) -> tuple[list[Path], list[Path]]:
    """Normal images and labelled anomalies to train on."""
    anomalies = [path for path, _, is_anomalous in listing.test if is_anomalous]
    if trained_on is None:
        wanted = outlier_count(len(listing.train), config.outlier_ratio, len(anomalies))
        order = torch.randperm(len(anomalies), generator=generator(config.seed))
        return listing.train, [anomalies[i] for i in sorted(order[:wanted].tolist())]
    found = {_relative(path, root): path for path in (*listing.train, *anomalies)}
    for name in (*trained_on.normal, *trained_on.anomalous):
        if name not in found:
            raise UserError(f"{root / name}: the run was trained on this image, which is not there; put it back")
    added = [path.name for path in listing.train if _relative(path, root) not in set(trained_on.normal)]
    if added:
        warnings.warn(
            f"{root}: {len(added)} images were added since the run began and are not trained on: {_some(added)}",
            stacklevel=2,
        )
    return [found[name] for name in trained_on.normal], [found[name] for name in trained_on.anomalous]


def _masks(folder: Path, test: Sequence[tuple[Path, str, bool]], size: tuple[int, int], config: DataConfig) -> Tensor:
    """[T, H, W] bool."""
    result, max_megapixels = torch.zeros(len(test), *size, dtype=torch.bool), config.max_megapixels
    stems = Counter((kind, path.stem) for path, kind, is_anomalous in test if is_anomalous)
    by_stem = {kind: _by_stem(folder / kind) for kind, _ in stems}
    doubtful, mostly, marked = [], 0, 0
    for i, (image, kind, is_anomalous) in enumerate(test):
        if not is_anomalous:
            continue
        if stems[kind, image.stem] > 1:
            raise UserError(
                f"{image}: expected images of different names, found {stems[kind, image.stem]} called {image.stem}, "
                "which would share a mask; rename one"
            )
        height, width = upright_size(image, max_megapixels)
        for file in _mask_files(folder / kind, by_stem[kind], image):
            mask = read_mask(file, max_megapixels)
            rows, columns = mask.shape
            # The same up to the rounding of one side.
            if abs(rows * width - columns * height) >= max(height, width):
                raise UserError(
                    f"{file}: expected a mask of the shape of its image, {width} × {height} when upright (by EXIF), "
                    f"received {columns} × {rows}; draw it on the upright image"
                )
            top, left, rows, columns = box_of((rows, columns), size) if config.letterbox else (0, 0, *size)
            result[i, top : top + rows, left : left + columns] |= resize_masks(mask[None], (rows, columns))[0]
            marked += 1
            mostly += 0.5 < float(mask.float().mean()) < 1
        if bool(result[i].all()) or not bool(result[i].any()):
            doubtful.append(f"{kind}/{image.name}")
    if doubtful:
        warnings.warn(
            f"{folder}: masks of {len(doubtful)} anomalous images mark nothing or everything: {_some(doubtful)}",
            stacklevel=2,
        )
    if mostly > marked / 2:
        warnings.warn(
            f"{folder}: {mostly} of {marked} masks mark more than half of their image as defect: white marks defects; "
            "invert the masks if black does",
            stacklevel=2,
        )
    return result


def _mask_files(folder: Path, by_stem: Mapping[str, Sequence[Path]], image: Path) -> Sequence[Path]:
    """The mask of an image, or its masks where they lie in a folder of its name, as in MVTec LOCO."""
    parts = folder / image.stem
    if os.path.isdir(parts):
        return image_files(parts)
    found = [*by_stem.get(image.stem, ()), *by_stem.get(f"{image.stem}_mask", ())]
    exact = [path for path in found if path.suffix.lower() not in (".jpg", ".jpeg")]
    if len(exact) == 1:
        return exact
    names = f"{image.stem}.png or {image.stem}_mask.png"
    if len(exact) > 1:
        both = " and ".join(path.name for path in exact[:2])
        raise UserError(f"{folder}: expected one mask of {image.name}, found {both}; remove one")
    if found:
        raise UserError(f"{found[0]}: a JPEG mask is blurred at its edges; save it as {names}")
    raise UserError(
        f"{folder}: expected the mask of {image.name} as {names}, found neither; "
        "add it, or remove the folder ground_truth to go without masks"
    )


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """The image files of a folder by their names without suffix; empty where there is no such folder."""
    found: dict[str, list[Path]] = {}
    for path in _entries(folder) if os.path.isdir(folder) else []:
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def _normal_folder(folder: Path, name: str) -> str:
    """The folder of the normal class. "" and "0", the settings' defaults, stand for the only one."""
    found = _subfolders(folder)
    wanted = {name.casefold(), *(GOOD if name.casefold() in GOOD else ())}
    same = [name] if name in found else [other for other in found if other.casefold() in wanted]
    if len(same) == 1:
        return same[0]
    if name in ("", "0") and len(found) == 1:
        return found[0]
    raise ArgumentError(
        "data.normal",
        f"one of {', '.join(found)}, the folders in {folder}",
        "no name" if name in ("", "0") else repr(name),
        "name the normal class: --data.normal NAME",
    )


def _subfolders(folder: Path) -> list[str]:
    found = [path.name for path in _entries(folder) if os.path.isdir(path)] if os.path.isdir(folder) else []
    if not found:
        raise UserError(
            f"expected folders of images in {folder}, found none; the layout is train/<normal> and test/<kind>, "
            "where test holds normal images (test/good) and anomalous ones"
        )
    return found


def _entries(folder: Path) -> list[Path]:
    """What is in a folder in the order of names, without hidden and service entries."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error
    return [folder / name for name in names if not name.startswith(".") and name.casefold() not in SERVICE]


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _advice(paths: Sequence[Path], config: DataConfig) -> str:
    """What to do about training images that are nearly constant."""
    if config.levels is not None:
        return f"check `data.levels`, now {config.levels[0]:g} and {config.levels[1]:g}"
    brightest = 0.0
    for path in paths:
        with opened(path, config.max_megapixels) as image:
            if image.mode.startswith(("I", "F")):
                brightest = max(brightest, float(np.asarray(image).max()))
    if not brightest:
        return "check that they show what they should, and that files of more than 8 bits are grey"
    return f"the brightest value in these files is {brightest:g}: try {levels_for(brightest)}"


def warn_of_unused_range(paths: Sequence[Path], max_megapixels: float = MEGAPIXELS, darkest: float = 0) -> None:
    """Warn where files of 16 bits use less than half of their range, which 8 bits of it would hardly tell apart.

    Args:
        paths: of images; a few of them are opened.
        max_megapixels: of an image.
        darkest: share of the range below which nothing is said.
    """

    def opened_ones() -> Iterator[Image.Image]:
        for path in paths[:: max(1, len(paths) // 8)][:8]:
            with suppress(UserError), opened(path, max_megapixels) as image:
                if image.mode.startswith("I") and image.format != "PPM":  # which tells its own range
                    yield image

    brightest = unused_range(opened_ones())
    if brightest is not None and brightest >= darkest * 65535:
        warnings.warn(
            f"{paths[0].parent}: images of 16 bits whose brightest value is {brightest:g} of 65535 keep "
            f"{max(1, round(brightest / 257))} of 256 levels of grey: set their range, {levels_for(brightest)}",
            stacklevel=3,
        )
