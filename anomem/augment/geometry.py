"""Crop, zoom, rotation, shift and flip as one affine map, sampled once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.augment.config import AugmentConfig, Padding


@dataclass
class Geometry:
    """One set of parameters per image, each [B] float32.

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

    # How many uniform numbers `drawn` takes per image.
    NUMBERS = 9

    @staticmethod
    def drawn(uniform: Tensor, config: AugmentConfig) -> Geometry:
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
        """[B, 2, 3]: where in the image each output pixel comes from, both in [−1, 1] coordinates.

        An output pixel is mirrored, then shifted back, rotated back and shrunk by the zoom, then placed in the crop.
        Rotation is in pixels, so that it does not shear an image that is not square.
        """
        cosine, sine = self.angle.cos() / self.zoom, self.angle.sin() / self.zoom
        wide = width / height
        a, b, c, d = cosine, sine / wide, -sine * wide, cosine
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


def warp(images: Tensor, geometry: Geometry, padding: Padding) -> Tensor:
    """Sample every image once, bilinearly.

    Args:
        images: [B, C, H, W] float.
        geometry: B parameters.
        padding: what lies outside of the image.

    Returns:
        [B, C, H, W].
    """
    theta = geometry.matrices(*images.shape[-2:]).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def moves(config: AugmentConfig) -> bool:
    """Whether the configuration moves pixels at all."""
    still = config.crop_area == config.crop_ratio == config.zoom == (1.0, 1.0)
    return not (still and config.flip == config.rotation == config.shift == 0)


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform
