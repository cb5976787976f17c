"""Pictures that `anomem score` writes: heat-map overlays, predicted masks, a sheet of the most anomalous images."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from anomem.errors import UserError
from anomem.files import make_folder, printable, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

    from anomem.data import ImageFiles

SOFTWARE = "anomem score"
"""In the text chunk Software of every PNG."""
THUMBNAIL, CAPTION, COLUMNS = 192, 34, 6
MOST = 36
"""Images of a contact sheet."""
OVERLAY, MASK = ".overlay.png", ".mask.png"


class Entry(NamedTuple):
    """An image of the contact sheet."""

    score: float
    caption: str
    picture: Image


class Pictures:
    """Collects and writes the pictures of a command.

    Args:
        overlays: whether to write an overlay beside each map.
        masks: whether to write a mask beside each map.
        sheet: whether to keep the most anomalous images for a contact sheet.
        threshold: of anomalous pixels, or None where it is not calibrated.

    Raises:
        UserError: masks without a threshold.
    """

    def __init__(self, overlays: bool, masks: bool, sheet: bool, threshold: float | None) -> None:
        if masks and threshold is None:
            raise UserError(
                "`--masks`: expected a fitted run with enough calibration normals for its alpha; see --alpha"
            )
        self.overlays, self.masks, self.sheet, self.threshold = overlays, masks, sheet, threshold
        self.any = overlays or masks or sheet
        self.limits: tuple[float, float] | None = None if threshold is None else (0.6 * threshold, 1.6 * threshold)
        self.kept: list[Entry] = []

    def add(
        self, name: str, score: float, deviations: Tensor, image: Path, files: ImageFiles, place: Path | None
    ) -> None:
        """Write what belongs to one image, and keep it for the sheet if it is among the most anomalous.

        Args:
            name: of the image, as it was given.
            score: of the image.
            deviations: [h, w], its map.
            image: its file.
            files: how it is read.
            place: of its .tiff, or None.

        Raises:
            UserError: the image cannot be read or a picture not be written.
        """
        wanted = self.sheet and (len(self.kept) < MOST or score > self.kept[-1].score)
        if not (wanted or self.overlays or self.masks):
            return
        photo, heat = photo_and_heat(image, deviations, files)
        if self.masks and place is not None and self.threshold is not None:
            write_png(place.with_suffix(MASK), mask(heat, self.threshold))
        laid = overlay(photo, heat, *(self.limits or self.set_limits(heat)))
        if self.overlays and place is not None:
            write_png(place.with_suffix(OVERLAY), laid)
        if wanted:
            self.kept = sorted([*self.kept, entry(score, name, laid)], key=lambda e: -e.score)[:MOST]

    def set_limits(self, heat: Tensor) -> tuple[float, float]:
        """Where no threshold is calibrated, the scale of all pictures is that of the first image's map [H, W]."""
        low = heat.quantile(0.5) if heat.numel() < 2**24 else heat.mean()  # quantile takes no more
        self.limits = float(low), float(heat.max())
        return self.limits

    def join(self, kept: Iterable[Sequence[Entry]]) -> None:
        """Take the most anomalous images of all processes for the sheet, each process's in `kept`."""
        self.kept = sorted(chain.from_iterable(kept), key=lambda e: -e.score)[:MOST]

    def write_sheet(self, file: Path) -> None:
        """Write the contact sheet, where there is anything to show."""
        if self.kept:
            write_png(file, contact_sheet(self.kept))


def photo_and_heat(image: Path, deviations: Tensor, files: ImageFiles) -> tuple[Tensor, Tensor]:
    """An image [C, H, W] uint8 and its map [H, W], brought from the frame of the model to the image's size.

    Args:
        image: its file.
        deviations: [h, w], its map.
        files: how it is read.

    Raises:
        UserError: the image cannot be read.
    """
    from anomem.data import read_image
    from anomem.data.frame import unframed

    photo = read_image(image, files.grey, levels=files.levels, max_megapixels=files.max_megapixels)
    return photo, unframed(deviations[None], (photo.shape[1], photo.shape[2]), files.letterbox)[0]


def is_ours(path: Path) -> bool:
    """Whether a file is a PNG that was written here."""
    from anomem.data.convert import opened

    try:
        with opened(path, float("inf")) as image:
            return image.info.get("Software") == SOFTWARE
    except UserError:
        return False


def overlay(photo: Tensor, heat: Tensor, low: float, high: float) -> Image:
    """An image with its map laid over it: transparent below `low`, bright yellow from `high` on.

    Args:
        photo: [C, H, W] uint8.
        heat: [H, W], of the same size.
        low: value of normal pixels.
        high: value that is surely anomalous.
    """
    from PIL import Image

    level = ((heat.float() - low) / max(high - low, 1e-30)).clamp(0, 1)
    # Dark violet over orange to yellow, as in the report.
    stops = torch.tensor([[90.0, 20.0, 140.0], [240.0, 90.0, 30.0], [255.0, 235.0, 90.0]])
    place = level * (len(stops) - 1)
    below = place.floor().clamp(max=len(stops) - 2).long()
    part = (place - below)[..., None]
    colour = stops[below] * (1 - part) + stops[below + 1] * part  # [H, W, 3]
    opacity = (0.75 * level.sqrt())[..., None]
    base = photo.expand(3, -1, -1).movedim(0, -1).float() if photo.shape[0] == 1 else photo[:3].movedim(0, -1).float()
    mixed = (base * (1 - opacity) + colour * opacity).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(mixed.numpy())


def mask(heat: Tensor, threshold: float) -> Image:
    """Where a map [H, W] exceeds the threshold: white on black."""
    from PIL import Image

    return Image.fromarray(((heat > threshold).to(torch.uint8) * 255).numpy())


def write_png(file: Path, picture: Image) -> None:
    """Write a picture with the text chunk by which it is known again."""
    from PIL.PngImagePlugin import PngInfo

    about: Any = PngInfo()
    about.add_text("Software", SOFTWARE)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=about)
    make_folder(file.parent)
    write_atomically(file, buffer.getvalue())


def entry(score: float, name: str, picture: Image) -> Entry:
    """A thumbnail with its caption."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return Entry(score, f"{score:.4g}  {printable(Path(name).name)}", small)


def contact_sheet(entries: Sequence[Entry]) -> Image:
    """The images with the highest scores, the first one top left.

    Args:
        entries: at least one.
    """
    from PIL import Image, ImageDraw, ImageFont

    ranked = sorted(entries, key=lambda e: -e.score)
    columns = min(COLUMNS, len(ranked))
    lines = -(-len(ranked) // columns)
    sheet = Image.new("RGB", (columns * (THUMBNAIL + 8) + 8, lines * (THUMBNAIL + CAPTION + 8) + 8), (24, 26, 30))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, one in enumerate(ranked):
        left, top = 8 + i % columns * (THUMBNAIL + 8), 8 + i // columns * (THUMBNAIL + CAPTION + 8)
        across, down = (THUMBNAIL - n for n in one.picture.size)
        sheet.paste(one.picture, (left + across // 2, top + down // 2))
        text = one.caption
        while draw.textlength(text, font=font) > THUMBNAIL and len(text) > 4:
            text = text[:-2] + "…"
        draw.text((left, top + THUMBNAIL + 6), text, fill=(235, 235, 235), font=font)
    return sheet
