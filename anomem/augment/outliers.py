"""Synthetic outliers: damaged copies of normal images in place of labelled anomalies (beyond the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.augment.augmentation import require_images_and_generator
from anomem.validation import require, require_names

# An image counts as damaged if some pixel has changed by this share of the full range.
VISIBLE = 0.15


@torch.no_grad()
def synthesize_outliers(images: Tensor, generator: torch.Generator, kinds: Sequence[str] | None = None) -> Tensor:
    """One damaged copy of each image; never waits for the device.

    The kinds are spread evenly over the batch, in random order (a batch smaller than the number of kinds gets the
    first ones). If a kind changes nothing visible (a piece of background pasted on background), a rectangle is
    inverted instead, so that every image returned is an anomaly.

    Args:
        images: [B, C, H, W] float in [0, 1], or uint8.
        generator: source of randomness on the images' device.
        kinds: names from `OUTLIERS`; None is all of them.

    Returns:
        [B, C, H, W] float32 in [0, 1].

    Raises:
        ArgumentError: no kind, an unknown one, no such images, or a generator on another device.
    """
    require_images_and_generator(images, generator)
    x = images.float() if images.is_floating_point() else images.float().mul_(1 / 255)
    names = tuple(OUTLIERS) if kinds is None else kinds
    require_names(names, "kinds", tuple(OUTLIERS))
    require(len(names) > 0, "kinds", lambda: f"at least one of {', '.join(OUTLIERS)}", "none")
    order = torch.randperm(len(x), generator=generator, device=x.device)
    result = torch.empty_like(x)
    for name, rows in zip(names, order.tensor_split(len(names)), strict=True):
        if len(rows):
            result[rows] = OUTLIERS[name](x[rows], generator)
    inside, _, _ = _rectangle(x, generator)
    # To the far end of the range, so that middle grey changes too.
    inverted = torch.where(inside, (x < 0.5).to(x.dtype), x)
    invisible = (result - x).abs().amax((1, 2, 3), keepdim=True) < VISIBLE
    return torch.where(invisible, inverted, result)


def cut_paste(x: Tensor, generator: torch.Generator) -> Tensor:
    """Replace a rectangle by another place of the same image (Li et al. 2021, CutPaste)."""
    inside, height, width = _rectangle(x, generator)
    # At least half the rectangle away, so that it is not pasted onto itself.
    draw = _signed(x, 2, generator)
    rows, columns = x.shape[-2:]
    down = (height.view(-1) * rows * (0.5 + draw[0].abs()) * draw[0].sign()).round().long()
    right = (width.view(-1) * columns * (0.5 + draw[1].abs()) * draw[1].sign()).round().long()
    row = (torch.arange(rows, device=x.device) + down[:, None]) % rows  # [B, H]
    column = (torch.arange(columns, device=x.device) + right[:, None]) % columns  # [B, W]
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    moved = x.movedim(1, -1)[image, row[:, :, None], column[:, None, :]].movedim(-1, 1)
    return torch.where(inside, moved, x)


def erase(x: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a rectangle with one value (random erasing, Zhong et al. 2020)."""
    inside, _, _ = _rectangle(x, generator)
    return torch.where(inside, _uniform(x, 1, generator).view(-1, 1, 1, 1), x)


def elastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """Displace the pixels smoothly, by up to a quarter of the side."""
    height, width = x.shape[-2:]
    coarse = torch.rand(len(x), 2, 4, 4, generator=generator, device=x.device, dtype=x.dtype) - 0.5
    field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    return _sample(x, torch.eye(2, 3, device=x.device, dtype=x.dtype).expand(len(x), 2, 3), field.movedim(1, -1))


def mix_rotated(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each image with the batch's next one, rotated by 60° to 300°."""
    angle = math.pi * (1 / 3 + 4 / 3 * _uniform(x, 1, generator)[0])
    zero = torch.zeros_like(angle)
    theta = torch.stack([angle.cos(), angle.sin(), zero, -angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    weight = 0.35 + 0.3 * _uniform(x, 1, generator).view(-1, 1, 1, 1)
    return torch.lerp(x, _sample(x.roll(1, 0), theta), weight)


def stroke(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a bent line of one brightness through the middle of the image."""
    height, width = x.shape[-2:]
    draw = _signed(x, 6, generator).view(6, -1, 1, 1, 1)
    # [1, 1, H, 1] and [1, 1, 1, W], in [−1, 1] like the grids of the warps.
    vertical, horizontal = (
        torch.linspace(-1 + 1 / size, 1 - 1 / size, size, device=x.device, dtype=x.dtype) for size in (height, width)
    )
    y, h = vertical.view(1, 1, -1, 1) - 0.4 * draw[0], horizontal.view(1, 1, 1, -1) - 0.4 * draw[1]
    angle = math.pi * draw[2]
    u, v = h * angle.cos() + y * angle.sin(), y * angle.cos() - h * angle.sin()  # along and across the line
    half_width = (0.09 + 0.04 * draw[3]).clamp_min(1.5 / min(height, width))
    inside = ((v - 0.8 * draw[4] * u.square()).abs() < half_width) & (u.abs() < 0.6)
    # Light on dark images and dark on light ones.
    value = (x.mean((1, 2, 3), keepdim=True) < 0.5).to(x.dtype) * 0.7 + 0.3 * draw[5].abs()
    return torch.where(inside, value, x)


OUTLIERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "cut_paste": cut_paste,
    "erase": erase,
    "elastic": elastic,
    "mix_rotated": mix_rotated,
    "stroke": stroke,
}


def _rectangle(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inside of a rectangle per image [B, 1, H, W] bool, and its height and width [B, 1, 1, 1] as fractions."""
    draw = _uniform(x, 4, generator).view(4, -1, 1, 1, 1)
    height, width = 0.2 + 0.3 * draw[0], 0.2 + 0.3 * draw[1]
    top, left = draw[2] * (1 - height), draw[3] * (1 - width)
    rows, columns = (
        ((torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) / size).view(shape)
        for size, shape in ((x.shape[-2], (1, 1, -1, 1)), (x.shape[-1], (1, 1, 1, -1)))
    )
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return inside, height, width


def _sample(x: Tensor, theta: Tensor, displacement: Tensor | float = 0.0) -> Tensor:
    grid = F.affine_grid(theta, list(x.shape), align_corners=False) + displacement
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _uniform(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, len(x), generator=generator, device=x.device, dtype=x.dtype)


def _signed(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return 2 * _uniform(x, count, generator) - 1
