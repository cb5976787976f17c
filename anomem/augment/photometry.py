"""Brightness, contrast, saturation, blur and noise, with one set of parameters per image.

The formulas are torchvision's (`adjust_brightness`, `adjust_contrast`, `adjust_saturation`, `gaussian_blur`,
`gaussian_noise` of `torchvision.transforms.v2.functional`), which take one number for a whole batch.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# ITU-R BT.601 luma with torchvision's rounding.
LUMA = (0.2989, 0.587, 0.114)


def adjust(images: Tensor, brightness: Tensor | None, contrast: Tensor | None, saturation: Tensor | None) -> Tensor:
    """Brightness, then contrast, then saturation; each result is clamped to [0, 1].

    Args:
        images: [B, C, H, W] float in [0, 1].
        brightness: [B] factors, 1 is neutral; None is 1 for all.
        contrast: [B] factors about the image's mean grey, or None.
        saturation: [B] factors about each pixel's grey, or None; nothing happens to one-channel images.

    Returns:
        [B, C, H, W] in [0, 1].
    """
    if brightness is not None:
        images = (images * brightness.view(-1, 1, 1, 1)).clamp_(0, 1)
    if contrast is not None:
        mean = grey(images).mean((1, 2, 3), keepdim=True)
        images = torch.lerp(mean, images, contrast.view(-1, 1, 1, 1)).clamp_(0, 1)
    if saturation is not None and images.shape[1] == 3:
        images = torch.lerp(grey(images), images, saturation.view(-1, 1, 1, 1)).clamp_(0, 1)
    return images


def grey(images: Tensor) -> Tensor:
    """Luma of colour images, the mean of any other number of channels: [B, C, H, W] -> [B, 1, H, W]."""
    if images.shape[1] == 3:
        return LUMA[0] * images[:, 0:1] + LUMA[1] * images[:, 1:2] + LUMA[2] * images[:, 2:3]
    return images if images.shape[1] == 1 else images.mean(1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image with its own Gaussian, mirrored at the edges.

    The filter along each axis is written as a matrix, so that the blur of a batch is two batched matrix products
    whatever the images' sigmas.

    Args:
        images: [B, C, H, W] float; H and W > radius.
        sigma: [B] standard deviations in pixels; one ≤ 0 leaves its image unchanged.
        radius: of the filter in pixels; it is 2·radius + 1 wide for all images.

    Returns:
        [B, C, H, W].
    """
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3).view(-1, 1)).square())  # [B, 2r + 1]
    weights = weights / weights.sum(1, keepdim=True)
    height, width = images.shape[-2:]
    down, right = (
        (weights @ _bands(size, radius, images.device).to(weights)).view(-1, 1, size, size) for size in (height, width)
    )
    return down @ images @ right.mT


def blur_radius(largest_sigma: float) -> int:
    """Pixels on each side that a Gaussian of this width needs: three standard deviations, at least one pixel."""
    return max(1, math.ceil(3 * largest_sigma))


@functools.lru_cache(maxsize=16)
def _bands(size: int, radius: int, device: torch.device) -> Tensor:
    """[2r + 1, size²]: row t of it is the matrix that shifts a line by t − r pixels, mirroring at the ends. Kept, since
    the copy to an accelerator waits for it."""
    rows = torch.arange(size)
    matrices = torch.zeros(2 * radius + 1, size, size)
    for index in range(2 * radius + 1):
        columns = rows + index - radius
        columns = columns.abs()
        columns = torch.where(columns >= size, 2 * (size - 1) - columns, columns)
        matrices[index, rows, columns] = 1
    return matrices.flatten(1).to(device)


def add_noise(images: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise, clamped to [0, 1].

    Args:
        images: [B, C, H, W] float in [0, 1].
        sigma: [B] standard deviations.
        generator: on the images' device.
    """
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return noise.mul_(sigma.view(-1, 1, 1, 1)).add_(images).clamp_(0, 1)
