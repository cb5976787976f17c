"""Images and masks as tensors: files, PIL images and arrays become uint8 pixels of a given size."""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from anomem.data.config import MEGAPIXELS, Levels
from anomem.errors import ArgumentError, UserError
from anomem.validation import require

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
"""Pillow's names of the formats that are opened. It knows many more; one of them starts another program."""
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height are exchanged
_LABELS = 31  # masks of a few values up to this one hold indices of defects
GREY = (19595, 38470, 7471)
"""Weights of red, green and blue in 1/65536, as Pillow's mode "L" rounds them (ITU-R 601-2)."""
_limit = threading.Lock()


def _renew_lock() -> None:
    global _limit
    _limit = threading.Lock()


# Another thread may hold the lock while a process forks, and is not there in the child to give it back.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def opened(path: Path, max_megapixels: float = MEGAPIXELS) -> Iterator[Image.Image]:
    """An image file of a documented format; the only place that opens images.

    Args:
        path: a regular file; FIFOs and devices are refused.
        max_megapixels: the most pixels it may have, in millions.

    Raises:
        UserError: the file cannot be read, is of another format, or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with _regular(path) as file, _unlimited(file) as image:
            width, height = image.size
            if width * height > max_megapixels * 1e6:
                raise UserError(
                    f"{path}: expected at most {max_megapixels:g} million pixels, received {width} × {height}; raise "
                    "`data.max_megapixels` if the image is sound"
                )
            yield image
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: expected a readable image (not a {', '.join(FORMATS)} file); repair or remove the file"
        ) from error
    except OSError as error:
        if error.filename is None:
            raise _unreadable(path, error) from error
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    # Pillow raises these for damaged files, and SyntaxError for some broken PNG files.
    except (ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: expected a readable image ({error}); repair or remove the file")


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading. A FIFO would block, a device may never end."""
    kind = os.stat(path).st_mode
    if stat.S_ISREG(kind):
        # Without O_NONBLOCK a FIFO that replaced the file in the meantime would block.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            kind = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(kind):
                yield file
                return
    names = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    found = next((name for test, name in names if test(kind)), "a device")
    raise UserError(f"{path}: expected an image file, received {found}")


def _unlimited(file: BinaryIO) -> Image.Image:
    """The image, whatever its size: Pillow's own limit is a global of the process."""
    from PIL import Image

    with _limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_image(
    path: Path, grey: bool = False, *, levels: Levels | None = None, max_megapixels: float = MEGAPIXELS
) -> Tensor:
    """The pixels of an image file: upright by its EXIF orientation, without transparency, as 8 bits.

    Args:
        path: the file.
        grey: one channel instead of three.
        levels: the values that become black and white in files of more than 8 bits; see `as_uint8`.
        max_megapixels: the most pixels it may have, in millions.

    Returns:
        [C, H, W] uint8.

    Raises:
        UserError: the file cannot be read, or its values need `levels`.
    """
    with opened(path, max_megapixels) as image:
        pixels = _pixels(image, "L" if grey else "RGB", str(path), levels)
    return pixels if grey or len(pixels) == 3 else pixels.expand(3, -1, -1)


def upright_size(path: Path, max_megapixels: float = MEGAPIXELS) -> tuple[int, int]:
    """(H, W) of an image file as `read_image` gives it; reads the header only, of most files."""
    with opened(path, max_megapixels) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        if turned and image.format == "TIFF":  # turned while it is loaded; before that, by some versions of Pillow
            image.load()
            turned = False
        width, height = image.size
    return (width, height) if turned else (height, width)


def unused_range(images: Iterable[Any]) -> float | None:
    """The brightest value of grey images of 16 bits where it is below half of their range, else None.

    A camera of 10 to 14 bits writes such files. As 8 bits of the whole range they keep 4 to 64 levels of grey.

    Args:
        images: PIL images, arrays or tensors; those of other kinds are left out.
    """
    brightest = []
    for image in images:
        mode = getattr(image, "mode", None)
        if not isinstance(mode, str) or mode.startswith("I"):
            values = np.asarray(image)
            if values.dtype == np.uint16 or (isinstance(mode, str) and values.dtype.kind == "i"):
                brightest.append(float(values.max(initial=0)))
    top = max(brightest, default=0.0)
    return top if 0 < top < 2**15 else None


def levels_for(brightest: float) -> str:
    """The option that spans the values of a camera whose brightest one is given."""
    white = brightest if brightest <= 1 else 2 ** math.ceil(math.log2(brightest + 1)) - 1
    return f"--data.levels 0 {white:g}"


def as_uint8(image: Any, name: str = "image", levels: Levels | None = None) -> Tensor:
    """An image as [C, H, W] uint8.

    Args:
        image: a PIL image, treated as a file of its mode (upright, palette and CMYK as RGB, no transparency); an array
            [H, W] or [H, W, C]; a tensor [H, W] or [C, H, W].
        name: the image's name in messages.
        levels: the values that become black and white where pixels have more than 8 bits; what lies outside is
            clipped. None: 0 and 1 for floating values, 0 and 65535 for 16-bit ones.

    Raises:
        ArgumentError: NaN or infinite values, values that need `levels`, or not an image.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return _pixels(image, "L" if image.mode in ("1", "L", "LA", "La") else "RGB", name, levels)
    if isinstance(image, Tensor):
        pixels = image
    else:
        array = np.asarray(image)
        if array.dtype == bool:
            array = array.astype(np.uint8) * 255
        numeric = array.dtype.kind in "uif"
        require(numeric, name, "a PIL image, an array or a tensor of pixels", type(image).__name__)
        # Copied, since arrays of PIL images are read-only and torch warns about them; in the machine's byte order.
        pixels = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))
        if pixels.dim() == 3:
            pixels = pixels.movedim(-1, 0)
    if pixels.dim() == 2:
        pixels = pixels[None]
    require(pixels.dim() == 3, name, "an image [C, H, W] or [H, W]", pixels)
    require(pixels.numel() > 0, name, "an image with pixels", pixels)
    if pixels.dtype == torch.uint8:
        return pixels
    require(
        not pixels.is_complex() and pixels.dtype != torch.bool, name, "uint8, uint16 or floating pixels", pixels.dtype
    )
    hint = "set `data.levels` to the values of black and white"
    if pixels.is_floating_point():
        if not bool(pixels.isfinite().all()):
            raise ArgumentError(name, "finite pixels", "NaN or infinity", "repair or remove this image")
        if levels is None:
            low, high = float(pixels.min()), float(pixels.max())
            require(low >= 0 and high <= 1, name, "floating pixels from 0 to 1", f"{low:.3g} to {high:.3g}", hint)
            return (pixels * 255).round().to(torch.uint8)
    elif levels is None:
        require(pixels.dtype == torch.uint16, name, "uint8, uint16 or floating pixels", pixels.dtype, hint)
        return ((pixels.int() + 128) // 257).to(torch.uint8)  # 65535 = 255 · 257
    black, white = levels
    return ((pixels.double() - black) * (255 / (white - black))).round().clamp(0, 255).to(torch.uint8)


def grey_of(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] uint8 in grey, [B, 1, H, W] int32 from 0 to 255, as Pillow rounds."""
    red, green, blue = (w * images[:, i : i + 1].int() for i, w in enumerate(GREY))
    return (red + green + blue + 0x8000) // 65536


def as_channels(images: Tensor, channels: int) -> Tensor:
    """Images [N, C, H, W] uint8 with one channel or three, whichever they have; other numbers of channels stay."""
    if images.shape[1] == 3 and channels == 1:
        return grey_of(images).to(torch.uint8)
    return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images


def _pixels(image: Image.Image, mode: str, name: str, levels: Levels | None) -> Tensor:
    """A PIL image upright in a mode, [C, H, W] uint8. One of more than 8 bits keeps its own mode."""
    from PIL import ImageOps

    kind, tiles = image.format, [*getattr(image, "tile", [])]
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        array = np.asarray(upright)
        if kind in ("PNG", "PPM") and upright.mode == "I":  # 16 bits, which Pillow keeps in 32
            white = tiles[0][3][1] if tiles and tiles[0][0] == "ppm" else 65535
            # Pillow stretches the file's own range to 16 bits; `levels` are the file's values.
            array = array.astype(np.uint16) if levels is None else np.rint(array * (white / 65535))
        return as_uint8(array, name, levels)
    deep = any(";16" in str(tile[3]) or (tile[0] == "ppm" and tile[3][1] > 255) for tile in tiles)
    if levels is not None and deep:
        raise ArgumentError(
            name, "a grey image, where `data.levels` is set and pixels have 16 bits", f"mode {upright.mode}",
            "Pillow keeps 8 bits of each colour: convert it to grey or to 8 bits",
        )  # fmt: skip
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # Pillow warns about the direct way
    return as_uint8(np.asarray(upright.convert(mode)), name)


def read_mask(path: Path, max_megapixels: float = MEGAPIXELS) -> Tensor:
    """The mask in an image file: [H, W] bool, True on anomalous pixels.

    Grey and colour: the brighter half of the range. A few small values (0 and 1, say): indices, where all but 0 are
    anomalous; so are those of a palette. Transparency: the opaque pixels, where all of them are bright or all dark.

    Raises:
        UserError: the file cannot be read, or can be read in two ways.
    """
    with opened(path, max_megapixels) as image:
        return torch.from_numpy(_mask(image, path))


def _mask(image: Image.Image, path: Path) -> NDArray[np.bool_]:
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _anomalous(np.asarray(upright))
    if "transparency" in upright.info or upright.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        pixels = np.asarray(upright.convert("RGBA"))
        opaque, bright = pixels[..., 3] >= 128, _anomalous(pixels[..., :3].max(-1))
        if opaque.all():
            return bright
        if bright[opaque].all() or not bright[opaque].any():
            return opaque
        ways = "its opaque pixels are bright and dark, so that its colour and its transparency are two different masks"
    elif upright.mode == "P":
        index, colour = np.asarray(upright), np.asarray(upright.convert("RGB"))
        if (colour == index[..., None]).all():  # a table of greys, each at its own place
            return _anomalous(index)
        bright = _anomalous(colour.max(-1))
        if not index.astype(bool).mean() > 0.5 > bright.mean() > 0:
            return index > 0
        ways = "the indices of its palette and its colours are two different masks"
    else:
        pixels = np.asarray(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
        return _anomalous(pixels if pixels.ndim == 2 else pixels.max(-1))
    raise UserError(f"{path}: expected a mask of black and white, but {ways}; save it in grey")


def _anomalous(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels in the upper half of the range, or all that are not 0 where the values are a few labels."""
    high = values.max(initial=0)
    if high <= _LABELS and len(labels := np.unique(values)) <= 5 and (labels == np.rint(labels)).all():
        return values > 0
    ranges = (1, 255, 4095, 65535) if values.dtype.kind == "f" else (255, 4095, 65535)
    return values > next((full for full in ranges if high <= full), high) / 2


def resize(images: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    """Images [N, C, H, W] uint8 resized to a side or to (H, W), bilinear with antialiasing; None keeps them."""
    size = (size, size) if isinstance(size, int) else size
    if size is None or tuple(images.shape[-2:]) == size:
        return images
    resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def resize_masks(masks: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    """Masks [N, H, W] bool resized to a side or to (H, W); None keeps them.

    A pixel of a smaller mask is anomalous where any of the pixels it stands for is, so that thin defects remain.
    """
    size = (size, size) if isinstance(size, int) else size
    if size is None or tuple(masks.shape[-2:]) == size:
        return masks
    smaller = [min(sides) for sides in zip(masks.shape[-2:], size, strict=True)]
    small = F.adaptive_max_pool2d(masks[:, None].float(), smaller)
    return F.interpolate(small, size=size, mode="nearest-exact")[:, 0] > 0.5
