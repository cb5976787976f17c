"""The augmentation of images, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.ops.library import define
from anomem.reference.augment import Padding, ViewParameters

PADDING_CODES: dict[Padding, int] = {"zeros": 0, "border": 1, "reflection": 2}
"""What the kernel receives for `padding`; the order is that of csrc/cpu/augment.h."""


def _augment_fake(
    images: Tensor,
    matrices: Tensor | None,
    brightness: Tensor | None,
    contrast: Tensor | None,
    saturation: Tensor | None,
    blur: Tensor | None,
    noise: Tensor | None,
    keys: Tensor | None,
    views: int,
    radius: int,
    padding: int,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (views, *images.shape[1:])
    return torch.empty(shape, dtype=torch.float32, device=images.device, memory_format=layout)


define(
    "native_augment",
    "(Tensor images, Tensor? matrices, Tensor? brightness, Tensor? contrast, Tensor? saturation, Tensor? blur, "
    "Tensor? noise, Tensor? keys, SymInt views, SymInt radius, int padding, bool channels_last) -> Tensor",
    _augment_fake,
)


def augment(
    images: Tensor, parameters: ViewParameters, views: int, radius: int, padding: Padding, channels_last: bool
) -> Tensor:
    """Views of images.

    Args:
        images: [B, C, H, W] uint8 or float32, any strides.
        parameters: of so many views, contiguous, float32 but for the keys.
        views: V, a multiple of B.
        radius: of the blur, below H and W.
        padding: pixels outside of an image.
        channels_last: whether the views are channels-last in memory.

    Returns:
        [V, C, H, W] float32.
    """
    code = PADDING_CODES[padding]
    result: Tensor = torch.ops.anomem.native_augment(images, *parameters, views, radius, code, channels_last)
    return result
