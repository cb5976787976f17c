"""The augmentation of images: its inputs, and what the library computes from them.

Images are turned, zoomed and shifted, their brightness, contrast and saturation changed, every second one is blurred.
The noise has the factor 0: its numbers are made and added, and rivals with other numbers pass the check.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.augment.augmentation import Geometry
from anomem.functional import ViewParameters
from benchmarks.harness.case import Dims, Function, Operator, Work, capped

RADIUS = 6
"""Of the blur's filter, for standard deviations up to 2."""


def images_and_numbers(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Images [B, C, H, H], angle, zoom and shifts [B, 4], factors and sigma of the blur [B, 4], and keys [B] int64."""
    B, C, H = (dims[name] for name in ("B", "C", "H"))
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(B, C, H, H, generator=generator).to(dtype)
    moves = torch.rand(B, 4, generator=generator) * torch.tensor([0.4, 0.4, 0.2, 0.2]) + torch.tensor([-0.2, 0.8, 0, 0])
    factors = 0.5 + torch.rand(B, 4, generator=generator)
    factors[::2, 3] = 0
    return images, moves, factors, torch.randint(2**63 - 1, (B,), generator=generator)


def parameters_of(images: Tensor, moves: Tensor, factors: Tensor, keys: Tensor) -> ViewParameters:
    """The parameters of the views."""
    angle, zoom, right, down = moves.unbind(1)
    ones, zeros = torch.ones_like(angle), torch.zeros_like(angle)
    geometry = Geometry(ones, ones, zeros, zeros, ones, zoom, angle, right, down)
    matrices = geometry.matrices(*images.shape[-2:])
    return ViewParameters(matrices, *factors.unbind(1), noise=zeros, keys=keys)


def augment(impl: str) -> Function:
    """The library's augmentation."""

    def views(images: Tensor, *numbers: Tensor) -> Tensor:
        return AF.augment(images, parameters_of(images, *numbers), radius=RADIUS, impl=impl)

    return views


def augment_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """The images are read, the views written; one logarithm for two normal numbers is counted as an exponential."""
    pixels = dims["B"] * dims["C"] * dims["H"] ** 2
    return Work(0, pixels * (itemsize + 4), pixels / 2)


AUGMENT = Operator(
    "augment",
    "warp, brightness, contrast, saturation, blur and noise",
    images_and_numbers,
    augment,
    augment_work,
    lambda dims: 2 * dims["B"] * dims["C"] * dims["H"] ** 2,
    lambda dims: capped(dims, B=8),
    width="C",
)
