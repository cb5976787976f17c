"""Images in the frame a model sees: stretched to it, or letterboxed with their aspect ratio kept."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anomem.data.convert import resize

Size = int | tuple[int, int]
"""Side of a square, or (H, W), in pixels."""


def height_and_width(size: Size) -> tuple[int, int]:
    """(H, W) of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def box_of(image: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where a letterboxed image lies in its frame: top, left, height and width.

    Args:
        image: (H, W).
        frame: (H, W).
    """
    scale = min(frame[0] / image[0], frame[1] / image[1])
    height, width = (max(1, min(f, round(i * scale))) for i, f in zip(image, frame, strict=True))
    return (frame[0] - height) // 2, (frame[1] - width) // 2, height, width


def framed(images: Tensor, frame: tuple[int, int], letterbox: bool) -> Tensor:
    """Images brought into a frame.

    Args:
        images: [N, C, H, W], uint8, or float in [0, 1].
        frame: (H', W').
        letterbox: keep the aspect ratio and repeat the border pixels around the image; else stretch it.

    Returns:
        [N, C, H', W'] of the same dtype.
    """
    size = (images.shape[2], images.shape[3])
    if size == frame:
        return images
    top, left, height, width = box_of(size, frame) if letterbox else (0, 0, *frame)
    if images.is_floating_point():
        inside = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    else:
        inside = resize(images, (height, width))
    around = (left, frame[1] - width - left, top, frame[0] - height - top)
    if not any(around):
        return inside
    return F.pad(inside.float(), around, mode="replicate").to(images.dtype)


def unframed(maps: Tensor, size: tuple[int, int], letterbox: bool) -> Tensor:
    """Maps of a frame at the size of an image that was brought into it: the inverse of `framed`.

    Args:
        maps: [N, H', W'], of the frame.
        size: (H, W) of the image.
        letterbox: as for `framed`.

    Returns:
        [N, H, W].
    """
    frame = (maps.shape[1], maps.shape[2])
    if size == frame:
        return maps
    top, left, height, width = box_of(size, frame) if letterbox else (0, 0, *frame)
    inside = maps[:, None, top : top + height, left : left + width]
    return F.interpolate(inside, size, mode="bilinear", align_corners=False)[:, 0]
