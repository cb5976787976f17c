"""Images and masks as tensors: files, PIL images and arrays become uint8 pixels of a given size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.errors import ArgumentError, UserError
from anomem.validation import require

if TYPE_CHECKING:
    from PIL import Image


def read_image(path: Path, grey: bool = False) -> Tensor:
    """The pixels of an image file: upright by its EXIF orientation, without transparency, 16 bits scaled to 8.

    Args:
        path: the file.
        grey: one channel instead of three.

    Returns:
        [C, H, W] uint8.

    Raises:
        UserError: the file cannot be read, or holds floating pixels outside of [0, 1] or 32-bit integers.
    """
    pixels = as_uint8(_open(path, "L" if grey else "RGB"), str(path))
    return pixels if grey or len(pixels) == 3 else pixels.expand(3, -1, -1)


def read_mask(path: Path) -> Tensor:
    """The mask in an image file: [H, W] bool, True on every pixel that is not black.

    Raises:
        UserError: the file cannot be read.
    """
    return torch.from_numpy(np.asarray(_open(path, "L")) > 0)


def _open(path: Path, mode: str) -> Image.Image:
    """The image upright, converted to the mode. One of more than 8 bits keeps its own: PIL would clip it at 255."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright if upright.mode.startswith(("I", "F")) else upright.convert(mode)
    # PIL raises these for files that are not images, and SyntaxError for some broken PNG files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected a readable image ({error}); repair or remove the file") from error


def as_uint8(image: Any, name: str = "image") -> Tensor:
    """An image as [C, H, W] uint8.

    Args:
        image: a PIL image; an array [H, W] or [H, W, C]; a tensor [H, W] or [C, H, W]. Floating values are in [0, 1],
            16-bit ones from 0 to 65535.
        name: the image's name in messages.

    Raises:
        ArgumentError: NaN or infinite values, floating values outside of [0, 1], or not an image.
    """
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
    if pixels.is_floating_point():
        if not bool(pixels.isfinite().all()):
            raise ArgumentError(name, "finite pixels", "NaN or infinity", "repair or remove this image")
        low, high = float(pixels.min()), float(pixels.max())
        require(low >= 0 and high <= 1, name, "floating pixels from 0 to 1", f"{low:.3g} to {high:.3g}")
        return (pixels * 255).round().to(torch.uint8)
    if pixels.dtype == torch.uint16:
        return ((pixels.int() + 128) // 257).to(torch.uint8)  # 65535 = 255 · 257
    require(pixels.dtype == torch.uint8, name, "uint8, uint16 or floating pixels", pixels.dtype)
    return pixels


def resize(images: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    """Images [N, C, H, W] uint8 resized to a side or to (H, W), bilinear with antialiasing; None keeps them."""
    size = (size, size) if isinstance(size, int) else size
    if size is None or tuple(images.shape[-2:]) == size:
        return images
    resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def resize_masks(masks: Tensor, size: int | None) -> Tensor:
    """Masks [N, H, W] bool resized to [N, size, size] by the nearest pixel; None keeps them."""
    if size is None or tuple(masks.shape[-2:]) == (size, size):
        return masks
    return F.interpolate(masks[:, None].float(), size=(size, size), mode="nearest-exact")[:, 0] > 0.5
