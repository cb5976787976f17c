"""The random augmentation of a batch: one affine warp, then brightness, contrast, saturation, blur and noise.

The photometric formulas are torchvision's (`torchvision.transforms.v2.functional`). They take one parameter per batch;
here each image has its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.augment.config import AugmentConfig, Padding
from anomem.validation import require, require_images

# ITU-R BT.601 luma with torchvision's rounding.
LUMA = (0.2989, 0.587, 0.114)


class Augmentation:
    """Draws parameters for each image and applies them to the batch on its device.

    It never waits for the device, and the same generator state gives the same bits.

    Args:
        config: the ranges.

    Example:
        >>> augmentation = Augmentation(AugmentConfig.for_dataset("digits"))
        >>> generator = torch.Generator(images.device).manual_seed(0)
        >>> views = augmentation(images, generator)  # [B, C, H, W] uint8 -> float32 in [0, 1]
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each image.

        Args:
            images: [B, C, H, W] uint8, or float in [0, 1].
            generator: source of randomness on the images' device.

        Returns:
            [B, C, H, W] float32 in [0, 1].

        Raises:
            ArgumentError: no such images, or a generator on another device.
        """
        x = as_float(images, generator)
        view = self.apply(x, *self.draw(x.shape, generator))
        return view.contiguous() if view is not images else view.clone()

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The random numbers of so many views.

        Args:
            shape: (B, C, H, W).
            generator: source of randomness.

        Returns:
            Uniform numbers [16, B], and normal ones [B, C, H, W], or None without noise.
        """
        device = generator.device
        uniform = torch.rand(Geometry.NUMBERS + 7, shape[0], generator=generator, device=device)
        noisy = self.config.noise > 0
        return uniform, torch.randn(tuple(shape), generator=generator, device=device) if noisy else None

    @torch.no_grad()
    def apply(self, x: Tensor, uniform: Tensor, normal: Tensor | None) -> Tensor:
        """The views that random numbers make.

        Args:
            x: [B, C, H, W] float32 in [0, 1].
            uniform: [16, B], from `draw`.
            normal: [B, C, H, W], from `draw`; overwritten.

        Returns:
            [B, C, H, W] float32 in [0, 1]; `x` itself where nothing is configured.
        """
        _, _, height, width = x.shape
        config = self.config
        jittered, brightness, contrast, saturation, blurred, sigma, noise = uniform[Geometry.NUMBERS :]
        if moves(config) and len(x):  # affine_grid takes no empty batch
            x = warp(x, Geometry.from_uniform(uniform, config), config.padding)
        if config.jitter > 0:
            on = (jittered < config.jitter).to(x.dtype)
            x = adjust(
                x,
                *(
                    torch.addcmul(torch.ones_like(on), on, (2 * numbers - 1) * spread) if spread > 0 else None
                    for numbers, spread in (
                        (brightness, config.brightness),
                        (contrast, config.contrast),
                        (saturation, config.saturation),
                    )
                ),
            )
        if config.blur > 0:
            low, high = config.blur_sigma
            radius = min(blur_radius(high), height - 1, width - 1)
            x = gaussian_blur(x, (low + (high - low) * sigma) * (blurred < config.blur), radius)
        if normal is not None:
            x = add_noise(x, config.noise * noise, normal)
        return x


def as_float(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 or float images as [B, C, H, W] float32 in [0, 1], after checking them against their generator."""
    require_images(images, "images")
    right = isinstance(generator, torch.Generator)
    require(right, "generator", "a torch.Generator", lambda: type(generator).__name__)
    same = generator.device.type == images.device.type
    require(same, "generator", lambda: f"a generator on {images.device}", generator.device)
    return images.float() if images.is_floating_point() else images.float().mul_(1 / 255)


@dataclass
class Geometry:
    """Crop, zoom, rotation, shift and flip of each image: nine parameters, each [B] float32.

    Attributes:
        crop_width: width of the crop over the image's.
        crop_height: height of the crop over the image's.
        crop_x: centre of the crop, from −1 (left edge of the image) to 1.
        crop_y: centre of the crop, from −1 (top edge) to 1.
        flip: −1 mirrors left and right, 1 does not.
        zoom: magnification about the centre of the crop.
        angle: radians, clockwise as seen.
        shift_x: to the right, as a fraction of the width.
        shift_y: downwards, as a fraction of the height.
    """

    crop_width: Tensor
    crop_height: Tensor
    crop_x: Tensor
    crop_y: Tensor
    flip: Tensor
    zoom: Tensor
    angle: Tensor
    shift_x: Tensor
    shift_y: Tensor

    # Uniform numbers that `from_uniform` takes per image.
    NUMBERS = 9

    @staticmethod
    def from_uniform(uniform: Tensor, config: AugmentConfig) -> Geometry:
        """Parameters from uniform numbers [9, B] in [0, 1)."""
        signed = 2 * uniform - 1
        area = _between(uniform[0], *config.crop_area)
        half_log_ratio = _between(uniform[1], *(0.5 * math.log(ratio) for ratio in config.crop_ratio))
        root, stretch = area.sqrt(), half_log_ratio.exp()
        width, height = (root * stretch).clamp_max(1), (root / stretch).clamp_max(1)
        return Geometry(
            crop_width=width,
            crop_height=height,
            crop_x=signed[2] * (1 - width),
            crop_y=signed[3] * (1 - height),
            flip=1 - 2 * (uniform[4] < config.flip).to(uniform.dtype),
            zoom=_between(uniform[5], *config.zoom),
            angle=signed[6] * math.radians(config.rotation),
            shift_x=signed[7] * config.shift,
            shift_y=signed[8] * config.shift,
        )

    def matrices(self, height: int, width: int) -> Tensor:
        """[B, 2, 3]: the place in the image that each output pixel is read from, both in [−1, 1] coordinates.

        An output pixel is mirrored, then shifted back, rotated back and shrunk by the zoom, then placed in the crop.
        Rotation is in pixels, so that it does not shear an image that is not square.
        """
        cosine, sine = self.angle.cos() / self.zoom, self.angle.sin() / self.zoom
        aspect = width / height
        a, b, c, d = cosine, sine / aspect, -sine * aspect, cosine
        x, y = -2 * self.shift_x, -2 * self.shift_y
        rows = [
            self.crop_width * a * self.flip,
            self.crop_width * b,
            self.crop_width * (a * x + b * y) + self.crop_x,
            self.crop_height * c * self.flip,
            self.crop_height * d,
            self.crop_height * (c * x + d * y) + self.crop_y,
        ]
        return torch.stack(rows, 1).view(-1, 2, 3)


def moves(config: AugmentConfig) -> bool:
    """Whether the configuration moves pixels at all."""
    still = config.crop_area == config.crop_ratio == config.zoom == (1.0, 1.0)
    return not (still and config.flip == config.rotation == config.shift == 0)


def warp(images: Tensor, geometry: Geometry, padding: Padding) -> Tensor:
    """Sample every image once, bilinearly.

    Args:
        images: [B, C, H, W] float.
        geometry: B parameters.
        padding: pixels outside of the image.

    Returns:
        [B, C, H, W].
    """
    height, width = images.shape[-2:]
    theta = geometry.matrices(height, width).to(images.dtype).unsqueeze(-1)  # [B, 2, 3, 1]
    x, y = (_centres(size, images.dtype, images.device) for size in (width, height))
    rows = torch.addcmul(theta[:, :, 2], theta[:, :, 1], y).unsqueeze(-1)  # [B, 2, H, 1]
    # In planes: in pairs, as `affine_grid` makes it, the grid takes longer than the sampling.
    grid = torch.addcmul(rows, theta[:, :, 0].unsqueeze(-1), x)  # [B, 2, H, W]
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode=padding, align_corners=False)


@functools.lru_cache(maxsize=16)
def _centres(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] centres of a line's pixels, from −1 to 1 at its ends.

    Cached, since a copy to an accelerator waits for the device.
    """
    return ((2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1).to(dtype).to(device)


def adjust(images: Tensor, brightness: Tensor | None, contrast: Tensor | None, saturation: Tensor | None) -> Tensor:
    """Brightness, then contrast, then saturation; each result is clamped to [0, 1].

    Args:
        images: [B, C, H, W] float in [0, 1].
        brightness: [B] factors, 1 is neutral; None is 1 for all.
        contrast: [B] factors about the image's mean grey, or None.
        saturation: [B] factors about each pixel's grey, or None; one-channel images are left as they are.

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
    if images.device.type == "cpu":  # others would wait for the number of blurred images
        chosen = (sigma > 0).nonzero().flatten()
        if len(chosen) < len(images):
            blurred = gaussian_blur(images[chosen], sigma[chosen], radius) if len(chosen) else images[:0]
            return images.index_copy(0, chosen, blurred)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3).view(-1, 1)).square())  # [B, 2r + 1]
    weights = weights / weights.sum(1, keepdim=True)
    batch, channels, height, width = images.shape
    down, right = (
        (weights @ _bands(size, radius, images.device).to(weights)).view(-1, size, size) for size in (height, width)
    )
    # One product an image, not one a channel: broadcast over channels it takes three times as long on a CPU.
    lines = images.transpose(1, 2).reshape(batch, height, channels * width)
    blurred = (down @ lines).view(batch, height * channels, width) @ right.mT
    return blurred.view(batch, height, channels, width).transpose(1, 2)


def blur_radius(largest_sigma: float) -> int:
    """Pixels on each side that a Gaussian of this width needs: three standard deviations, at least one pixel."""
    return max(1, math.ceil(3 * largest_sigma))


@functools.lru_cache(maxsize=16)
def _bands(size: int, radius: int, device: torch.device) -> Tensor:
    """[2r + 1, size²]: row t is the matrix that shifts a line by t − r pixels, mirrored at the ends.

    Cached, since a copy to an accelerator waits for the device.
    """
    rows = torch.arange(size)
    matrices = torch.zeros(2 * radius + 1, size, size)
    for index in range(2 * radius + 1):
        columns = (rows + index - radius).abs()
        columns = torch.where(columns >= size, 2 * (size - 1) - columns, columns)
        matrices[index, rows, columns] = 1
    return matrices.flatten(1).to(device)


def add_noise(images: Tensor, sigma: Tensor, normal: Tensor) -> Tensor:
    """Gaussian noise, clamped to [0, 1].

    Args:
        images: [B, C, H, W] float in [0, 1].
        sigma: [B] standard deviations.
        normal: [B, C, H, W] normal numbers; overwritten.
    """
    return normal.mul_(sigma.view(-1, 1, 1, 1)).add_(images).clamp_(0, 1)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform
