"""The augmentation of images from given parameters: warp, brightness, contrast, saturation, blur and noise.

The photometric formulas are torchvision's (`torchvision.transforms.v2.functional`). They take one parameter per batch;
here each view has its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = Literal["zeros", "border", "reflection"]

# ITU-R BT.601 luma with torchvision's rounding.
LUMA = (0.2989, 0.587, 0.114)


class ViewParameters(NamedTuple):
    """Parameters of V views; None leaves every view as it is."""

    matrices: Tensor | None = None
    """[V, 2, 3]: the place in the image that each pixel of a view is read from, both in [−1, 1] coordinates."""
    brightness: Tensor | None = None
    """[V] factors; 1 is neutral."""
    contrast: Tensor | None = None
    """[V] factors about the image's mean grey."""
    saturation: Tensor | None = None
    """[V] factors about each pixel's grey; images of other than three channels are left as they are."""
    blur: Tensor | None = None
    """[V] standard deviations in pixels; one ≤ 0 leaves its view unchanged."""
    noise: Tensor | None = None
    """[V] standard deviations, in units of the [0, 1] image."""
    keys: Tensor | None = None
    """[V] int64, of the noise; given with it."""


def augment(
    images: Tensor,
    parameters: ViewParameters,
    padding: Padding = "zeros",
    radius: int = 0,
    normal: Tensor | None = None,
) -> Tensor:
    """Views of images: warped, then adjusted, then blurred, then noisy.

    Args:
        images: [B, C, H, W] float in [0, 1], or uint8.
        parameters: of V views, V a multiple of B; view v is of image v mod B. Without any, V is B.
        padding: pixels outside of an image.
        radius: of the blur's filter in pixels, at most H − 1 and W − 1.
        normal: [V, C, H, W] numbers for the noise, which are overwritten; those of the keys when None.

    Returns:
        [V, C, H, W] in the images' dtype (float32 for uint8); the images themselves where nothing is given.
    """
    x = images if images.is_floating_point() else images.float().mul_(1 / 255)
    given = [p if p is None or not p.is_floating_point() else p.to(x.dtype) for p in parameters]
    matrices, brightness, contrast, saturation, blur, noise, keys = given
    views = next((len(p) for p in given if p is not None), len(x))
    if views == 0:
        return x[:0].clone()
    if views != len(x):
        x = x.repeat(views // len(x), 1, 1, 1)
    if matrices is not None:
        x = warp(x, matrices, padding)
    x = adjust(x, brightness, contrast, saturation)
    if blur is not None:
        x = gaussian_blur(x, blur, radius)
    if noise is not None:
        if normal is None:
            assert keys is not None
            normal = normal_numbers(keys, x[0].numel(), x.dtype).view_as(x)
        x = add_noise(x, noise, normal)
    return x


def warp(images: Tensor, matrices: Tensor, padding: Padding) -> Tensor:
    """Sample every image once, bilinearly.

    Args:
        images: [B, C, H, W] float, B ≥ 1.
        matrices: [B, 2, 3], see `ViewParameters`.
        padding: pixels outside of the image.

    Returns:
        [B, C, H, W].
    """
    height, width = images.shape[-2:]
    theta = matrices.to(images.dtype).unsqueeze(-1)  # [B, 2, 3, 1]
    centres = _make_centres if is_traced() else _kept_centres
    x, y = (centres(size, images.dtype, images.device) for size in (width, height))
    rows = torch.addcmul(theta[:, :, 2], theta[:, :, 1], y).unsqueeze(-1)  # [B, 2, H, 1]
    # In planes: in pairs, as `affine_grid` makes it, the grid takes longer than the sampling.
    grid = torch.addcmul(rows, theta[:, :, 0].unsqueeze(-1), x)  # [B, 2, H, W]
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode=padding, align_corners=False)


def _make_centres(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] centres of a line's pixels, from −1 to 1 at its ends."""
    place = torch.arange(size, dtype=torch.float64, device="cpu")
    return ((2 * place + 1) / size - 1).to(dtype).to(device)


@functools.lru_cache(maxsize=16)
def _kept_centres(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A copy to an accelerator waits for the device, so that it is made once. Kept from inference mode, it could not be
    # saved for a gradient.
    with torch.inference_mode(False):
        return _make_centres(size, dtype, device)


def adjust(images: Tensor, brightness: Tensor | None, contrast: Tensor | None, saturation: Tensor | None) -> Tensor:
    """Brightness, then contrast, then saturation; each result is clamped to [0, 1].

    Args:
        images: [B, C, H, W] float in [0, 1].
        brightness: [B] factors, 1 is neutral; None is 1 for all.
        contrast: [B] factors about the image's mean grey, or None.
        saturation: [B] factors about each pixel's grey, or None; images of other than three channels are left as they
            are.

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

    The filter on each axis is a matrix, so that a batch takes two batched matrix products whatever its sigmas.

    Args:
        images: [B, C, H, W] float; H and W > radius.
        sigma: [B] standard deviations in pixels; one ≤ 0 leaves its image unchanged.
        radius: of the filter in pixels; it is 2·radius + 1 wide for all images.

    Returns:
        [B, C, H, W].
    """
    traced = is_traced()
    if images.device.type == "cpu" and not traced:  # others would wait for the number of blurred images
        chosen = (sigma > 0).nonzero().flatten()
        if len(chosen) < len(images):
            blurred = _blurred(images[chosen], sigma[chosen], radius, _kept_bands) if len(chosen) else images[:0]
            return images.index_copy(0, chosen, blurred)
    blurred = _blurred(images, sigma, radius, _make_bands if traced else _kept_bands)
    return torch.where(sigma.view(-1, 1, 1, 1) > 0, blurred, images)


def _blurred(images: Tensor, sigma: Tensor, radius: int, bands: Callable[..., Tensor]) -> Tensor:
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3).view(-1, 1)).square())  # [B, 2r + 1]
    weights = weights / weights.sum(1, keepdim=True)
    batch, channels, height, width = images.shape
    down, right = (
        (weights @ bands(size, radius, images.device).to(weights)).view(-1, size, size) for size in (height, width)
    )
    # One product an image, not one a channel: broadcast over channels it takes three times as long on a CPU.
    lines = images.transpose(1, 2).reshape(batch, height, channels * width)
    blurred = (down @ lines).view(batch, height * channels, width) @ right.mT
    return blurred.view(batch, height, channels, width).transpose(1, 2)


def blur_radius(largest_sigma: float) -> int:
    """Pixels on each side that a Gaussian of this width needs: three standard deviations, at least one pixel."""
    return max(1, math.ceil(3 * largest_sigma))


def _make_bands(size: int, radius: int, device: torch.device) -> Tensor:
    """[2r + 1, size²]: row t is the matrix that shifts a line by t − r pixels, mirrored at the ends."""
    place = torch.arange(size, device="cpu")
    columns = (place + torch.arange(-radius, radius + 1, device="cpu").unsqueeze(1)).abs()  # [2r + 1, size]
    columns = torch.where(columns >= size, 2 * (size - 1) - columns, columns)
    return (columns.unsqueeze(-1) == place).float().flatten(1).to(device)


@functools.lru_cache(maxsize=16)
def _kept_bands(size: int, radius: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make_bands(size, radius, device)


def add_noise(images: Tensor, sigma: Tensor, normal: Tensor) -> Tensor:
    """Gaussian noise, clamped to [0, 1].

    Args:
        images: [B, C, H, W] float in [0, 1].
        sigma: [B] standard deviations.
        normal: [B, C, H, W] normal numbers; overwritten.
    """
    return normal.mul_(sigma.view(-1, 1, 1, 1)).add_(images).clamp_(0, 1)


def normal_numbers(keys: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers that depend on their key and place alone: words of a hash, by Box and Muller in pairs.

    Places i and i + ⌈count / 2⌉ make a pair. Its two words are hashes of 2i and 2i + 1; 24 bits of the first give a
    uniform u in (0, 1], those of the second an angle. The pair is sqrt(−2 ln u) times its cosine and its sine.

    Args:
        keys: [V] int64.
        count: numbers of each key, at most 2^32.
        dtype: of the result.

    Returns:
        [V, count], of absolute value below 5.8.
    """
    half = (count + 1) // 2
    even = 2 * torch.arange(half, device=keys.device)
    low, high = (keys & _WORD).unsqueeze(1), ((keys >> 32) & _WORD).unsqueeze(1)
    first, second = (_mixed(_mixed(counter ^ low) ^ high) >> 8 for counter in (even, even + 1))  # [V, half], 24 bits
    length = ((first + 1).to(dtype) * 2.0**-24).log_().mul_(-2).sqrt_()
    angle = second.to(dtype) * (2 * math.pi * 2.0**-24)
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)[:, :count]


_WORD = 2**32 - 1


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, held in int64: multipliers and shifts of "hash-prospector" (Wellons 2018).

    Both multipliers are below 2^31, so that no product overflows.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)


def is_traced() -> bool:
    """Whether values must not be read, and tensors that are made must not be kept."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
