"""The random augmentation of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.augment.config import AugmentConfig
from anomem.augment.geometry import Geometry, moves, warp
from anomem.augment.photometry import add_noise, adjust, blur_radius, gaussian_blur
from anomem.validation import require


class Augmentation:
    """Draws one set of parameters per image and applies them to the batch on its device.

    Nothing waits for the device, and the same generator state gives the same bits.

    Args:
        config: the ranges.

    Raises:
        ArgumentError: a range that makes no sense.
    """

    def __init__(self, config: AugmentConfig) -> None:
        config.validate()
        self.config = config

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each image.

        Args:
            images: [B, C, H, W] uint8, or float in [0, 1].
            generator: source of randomness on the images' device.

        Returns:
            [B, C, H, W] float32 in [0, 1].
        """
        x = as_float(images, generator)
        batch, _, height, width = x.shape
        config = self.config
        uniform = torch.rand(Geometry.NUMBERS + 7, batch, generator=generator, device=x.device)
        jittered, brightness, contrast, saturation, blurred, sigma, noise = uniform[Geometry.NUMBERS :]
        if moves(config):
            x = warp(x, Geometry.drawn(uniform, config), config.padding)
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
        if config.noise > 0:
            x = add_noise(x, config.noise * noise, generator)
        return x.contiguous() if x is not images else x.clone()


def as_float(images: Tensor, generator: torch.Generator) -> Tensor:
    """[B, C, H, W] float32 in [0, 1] of uint8 or float images, after checking them against their generator."""
    require(isinstance(images, Tensor) and images.dim() == 4, "images", "a tensor [B, C, H, W]", images)
    right = images.dtype == torch.uint8 or images.is_floating_point()
    require(right, "images", "uint8, or float in [0, 1]", images.dtype)
    same = generator.device.type == images.device.type
    require(same, "generator", lambda: f"a generator on {images.device}", generator.device)
    return images.float() if images.is_floating_point() else images.float().mul_(1 / 255)
