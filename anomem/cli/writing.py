"""Files that the commands write: tables of scores and deviation maps, none of them over a file that is not ours."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomem.cli import outputs
from anomem.errors import UserError
from anomem.files import Guard, make_folder, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from anomem.cli.inputs import Given
    from anomem.cli.score import Score
    from anomem.data import ImageFiles
    from anomem.train.rundir import RunDirectory

ROWS = re.compile(rb'(path|image),kind,anomalous,|\[\s*\{\s*"path": ')
"""How a file of scores begins."""
DESCRIPTION = "anomem deviation map"
"""In the TIFF tag ImageDescription (270) of every map."""


def places(command: Score, given: Sequence[Given], run: RunDirectory, root: Path) -> list[Path]:
    """The files of the maps, after checking that everything the command writes may be written.

    Raises:
        UserError: something would be written over an input or over what is not ours.
    """
    guard = require_writable(command, given, run)
    if command.maps is None:
        return []
    files = _map_files(command.maps, given, command.paths[0] if command.watch else None)
    for file in files:
        guard.require(file, "--maps", _is_map)
        for suffix, wanted in ((outputs.OVERLAY, command.overlays), (outputs.MASK, command.masks)):
            if wanted:
                guard.require(file.with_suffix(suffix), "--maps", outputs.is_ours)
    if not command.overwrite:
        for folder in {file.parent for file in files}:
            data = [part for name in ("train", "test", "ground_truth") if os.path.isdir(part := root / name)]
            if any(folder.resolve().is_relative_to(part.resolve()) for part in data) or _holds_images(folder):
                raise UserError(
                    f"`--maps`: {folder} is a folder of images; choose another, or add --overwrite to write there"
                )
    return files


def require_writable(command: Score, given: Sequence[Given], run: RunDirectory) -> Guard:
    """What must not be written over, after checking the files that the command names.

    Raises:
        UserError: one of them is of another kind, an input, or not ours.
    """
    settings = (run.config_file, run.given_file, run.split_file, run.log_file, *run.checkpoints.glob("*"))
    guard = Guard([*(image.file for image in given), Path("/dev/fd/0"), *settings], command.overwrite)
    if command.output is not None:
        if command.output.suffix not in (".csv", ".json"):
            raise UserError(f"`--output`: expected a .csv or .json file, received {command.output}")
        guard.require(command.output, "--output", lambda path: begins(path, ROWS))
    if command.sheet is not None:
        if command.sheet.suffix != ".png":
            raise UserError(f"`--sheet`: expected a .png file, received {command.sheet}")
        guard.require(command.sheet, "--sheet", outputs.is_ours)
    if command.maps is None and (command.overlays or command.masks):
        raise UserError(f"`--{'overlays' if command.overlays else 'masks'}`: expected --maps, the folder to write to")
    return guard


def _map_files(folder: Path, images: Sequence[Given], base: Path | None = None) -> list[Path]:
    """One .tiff per image in a folder, laid out as the images are.

    Args:
        folder: of the maps.
        images: all of them.
        base: the folder of the images; the deepest one that holds them all when None.

    Raises:
        UserError: two images differ only in their suffix, so that their maps would be one file, or a link in the
            folder leads out of it.
    """
    # Without "..": with it a map would leave the folder.
    absolute = [Path(os.path.abspath(i.name if str(i.file) == i.name else i.file.name)) for i in images]
    common = os.path.commonpath([path.parent for path in absolute]) if base is None else os.path.abspath(base)
    files = [(folder / path.relative_to(common)).with_suffix(".tiff") for path in absolute]
    ((file, count),) = Counter(files).most_common(1)
    if count > 1:
        raise UserError(f"`--maps`: expected images of different names, received {count} whose map would be {file}")
    for parent in {file.parent for file in files}:
        if not parent.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"`--maps`: {parent} leads out of {folder}; remove the link")
    return files


def _is_map(path: Path) -> bool:
    """Whether a file is a deviation map of ours."""
    from anomem.data.convert import opened

    try:
        with opened(path, float("inf")) as image:
            return bool(getattr(image, "tag_v2", {}).get(270) == DESCRIPTION)
    except UserError:
        return False


def _holds_images(folder: Path) -> bool:
    """Whether a folder holds images that are no maps of ours."""
    from anomem.data import image_files

    try:
        return os.path.isdir(folder) and not all(_is_map(p) or outputs.is_ours(p) for p in image_files(folder))
    except UserError:  # none in it
        return False


def begins(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether a file is empty or begins as one of ours."""
    try:
        with path.open("rb") as file:
            content = file.read(4096)
    except OSError:
        return False
    return not content or pattern.match(content) is not None


def write_map(file: Path, deviations: Tensor, image: Path, files: ImageFiles) -> None:
    """Write one deviation map [H, W] as float32, at the size of its image."""
    from PIL import Image

    from anomem.data import upright_size
    from anomem.data.frame import unframed

    resized = unframed(deviations[None], upright_size(image, files.max_megapixels), files.letterbox)[0]
    buffer = io.BytesIO()
    Image.fromarray(resized.numpy()).save(buffer, format="TIFF", description=DESCRIPTION)
    make_folder(file.parent)
    write_atomically(file, buffer.getvalue())


def write_rows(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write scores as .csv or .json."""
    if output.suffix == ".json":
        text = json.dumps(rows, indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    make_folder(output.parent)
    # A name that is not UTF-8 has surrogates in it.
    write_atomically(output, text.encode("utf-8", "backslashreplace"))
