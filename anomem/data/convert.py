"""Whatever a data set hands out as an image, as a uint8 tensor of a given shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.validation import require


def as_uint8(image: Any, name: str = "image") -> Tensor:
    """An image as [C, H, W] uint8.

    Args:
        image: a PIL image; an array [H, W] or [H, W, C]; a tensor [H, W] or [C, H, W]. Floating values are in [0, 1],
            16-bit ones from 0 to 65535.
        name: what to call it in a message.

    Raises:
        ArgumentError: NaN or infinite values, floating values outside of [0, 1], or not an image.
    """
    if isinstance(image, Tensor):
        pixels = image
    else:
        array = np.asarray(image)
        if array.dtype == bool:
            array = array.astype(np.uint8) * 255
        right = array.dtype.kind in "uif"
        require(right, name, "a PIL image, an array or a tensor of pixels", type(image).__name__)
        # A copy, since torch warns about arrays of PIL images, which cannot be written to; in the machine's byte order.
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
