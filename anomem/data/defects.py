"""Local defects drawn into grey images, with exact masks: outside its mask an image keeps every pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anomem.validation import require_choice

DEFECTS = ("scratch", "blot", "cut_paste")


def add_defect(image: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image with one local defect.

    Args:
        image: [1, H, W] uint8 on the CPU.
        kind: "scratch" (a thin bent line, lighter or darker), "blot" (a round stain) or "cut_paste" (a rectangle
            taken from elsewhere in the image, mirrored).
        generator: source of randomness.

    Returns:
        The image [1, H, W] uint8 and the mask [H, W] bool of the pixels that were painted over.
    """
    require_choice(kind, "kind", DEFECTS)
    if kind == "cut_paste":
        return _cut_paste(image, generator)
    draw = _Uniform(generator)
    height, width = image.shape[-2:]
    side = min(height, width)
    along, across = _coordinates(height, width, draw)
    if kind == "scratch":
        length, bend = side * draw(0.25, 0.45), draw(-0.5, 0.5) / side
        # Rotated so that the line runs along one axis; the bend makes it a parabola.
        inside = (along.abs() <= length) & ((across - bend * along.square()).abs() <= draw(0.75, 1.6))
        strength = 1.0
    else:
        radius, stretch = side * draw(0.08, 0.18), draw(0.7, 1.4)
        inside = (along / stretch).square() + (across * stretch).square() <= radius**2
        strength = draw(0.5, 0.8)
    pixels = image[0].float()
    # Away from the local brightness, so that the defect can be seen.
    local = float(pixels[inside].mean())
    step = draw(50.0, 110.0)
    target = local + step if local < 128 else local - step
    painted = pixels + inside * strength * (target - pixels)
    return painted.clamp(0, 255).round().to(torch.uint8)[None], inside


def _cut_paste(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    draw = _Uniform(generator)
    height, width = image.shape[-2:]
    rows, columns = (max(2, round(size * draw(0.15, 0.35))) for size in (height, width))
    top, from_top = (int(draw(0, height - rows + 1)) for _ in range(2))
    left, from_left = (int(draw(0, width - columns + 1)) for _ in range(2))
    result, mask = image.clone(), torch.zeros(height, width, dtype=torch.bool)
    piece = image[:, from_top : from_top + rows, from_left : from_left + columns].flip(1)
    result[:, top : top + rows, left : left + columns] = piece
    mask[top : top + rows, left : left + columns] = True
    return result, mask


def _coordinates(height: int, width: int, draw: _Uniform) -> tuple[Tensor, Tensor]:
    """Pixel coordinates along and across a random direction through a random point of the middle."""
    y = torch.arange(height).float()[:, None] - height * draw(0.25, 0.75)
    x = torch.arange(width).float()[None, :] - width * draw(0.25, 0.75)
    angle = draw(0.0, math.pi)
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


class _Uniform:
    """draw(low, high): one uniform number from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._generator))
