"""Augmentation by others: plain PyTorch with `torch.randn`, and torchvision image by image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomem import reference
from benchmarks.harness.case import Case, Function, Implementation
from benchmarks.harness.rows import Unavailable
from benchmarks.operators_augment import RADIUS, parameters_of


def with_randn(case: Case, device: str) -> Function:
    """The reference with torch's normal numbers, which take a fraction of the time of those of a hash in PyTorch."""

    def views(images: Tensor, *numbers: Tensor) -> Tensor:
        parameters, radius = parameters_of(images, *numbers), min(RADIUS, case.dims["H"] - 1)
        return reference.augment(images, parameters, "zeros", radius, torch.randn_like(images))

    return views


def by_torchvision(case: Case, device: str) -> Function:
    """torchvision's functions on one image after another, as its transforms call them.

    Raises:
        Unavailable: torchvision is missing.
    """
    try:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as TV
    except ImportError:
        raise Unavailable("torchvision is not installed: pip install 'anomem[lab]'") from None
    side = case.dims["H"]
    width = 2 * min(RADIUS, side - 1) + 1

    def view(x: Tensor, move: list[float], factor: list[float]) -> Tensor:
        angle, zoom, right, down = move
        brightness, contrast, saturation, sigma = factor
        shift = [right * side, down * side]
        x = TV.affine(x, math.degrees(angle), shift, zoom, [0.0, 0.0], InterpolationMode.BILINEAR)
        x = TV.adjust_contrast(TV.adjust_brightness(x, brightness), contrast)
        x = TV.adjust_saturation(x, saturation)
        if sigma > 0:
            x = TV.gaussian_blur(x, [width, width], [sigma, sigma])
        return TV.gaussian_noise(x, 0.0, 0.0)

    def views(images: Tensor, moves: Tensor, factors: Tensor, keys: Tensor) -> Tensor:
        numbers = zip(images, moves.tolist(), factors.tolist(), strict=True)
        return torch.stack([view(*one) for one in numbers])

    return views


IMPLEMENTATIONS = (
    Implementation("eager, torch.randn", "augment", with_randn, stored=2),
    Implementation("torchvision, image by image", "augment", by_torchvision, stored=1),
)
