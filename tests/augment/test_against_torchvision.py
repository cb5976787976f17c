"""Each augmentation against torchvision's, called image by image with equal parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as TV
from torch import Tensor
from torchvision.transforms import InterpolationMode

from anomem.augment import AugmentConfig
from anomem.augment.augmentation import NUMBERS, Geometry, in_ranges
from anomem.reference.augment import Padding, add_noise, adjust, blur_radius, gaussian_blur
from anomem.reference.augment import warp as warp_by
from anomem.testing import assert_within_budget

BATCH = 6


def pictures(channels: int = 3, height: int = 24, width: int = 24) -> Tensor:
    """[B, C, H, W] float32 in [0, 1]."""
    return torch.rand(BATCH, channels, height, width, generator=torch.Generator().manual_seed(1))


def still(**given: Tensor) -> Geometry:
    """A geometry that moves nothing but what is given."""
    ones, zeros = torch.ones(BATCH), torch.zeros(BATCH)
    neutral = dict.fromkeys(("crop_width", "crop_height", "flip", "zoom"), ones)
    neutral |= dict.fromkeys(("crop_x", "crop_y", "angle", "shift_x", "shift_y"), zeros)
    return Geometry(**{**neutral, **given})


def warp(images: Tensor, geometry: Geometry, padding: Padding) -> Tensor:
    return warp_by(images, geometry.matrices(*images.shape[-2:]), padding)


def double(geometry: Geometry) -> Geometry:
    return Geometry(**{name: x.double() for name, x in vars(geometry).items() if isinstance(x, Tensor)})


def hold(images: Tensor, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    """Ours in float32 within the budget that torchvision's own float32 error sets against its float64."""
    assert_within_budget(ours(images), theirs(images), theirs(images.double()))


@pytest.mark.parametrize("shape", [(24, 24), (16, 30)])
def test_rotation_shift_and_zoom_are_the_affine_map(shape: tuple[int, int]) -> None:
    height, width = shape
    angles = [-30.0, -10.0, 0.0, 5.0, 20.0, 90.0]
    zooms = [0.8, 0.9, 1.0, 1.1, 1.3, 1.0]
    shifts = [(2, -3), (0, 0), (1, 0), (0, 4), (-5, 2), (3, 3)]
    geometry = still(
        angle=torch.tensor([math.radians(angle) for angle in angles], dtype=torch.float64),
        zoom=torch.tensor(zooms, dtype=torch.float64),
        shift_x=torch.tensor([x / width for x, _ in shifts], dtype=torch.float64),
        shift_y=torch.tensor([y / height for _, y in shifts], dtype=torch.float64),
    )
    images = pictures(3, height, width).double()
    theirs = [
        TV.affine(image, angle, [float(x), float(y)], zoom, [0.0, 0.0], InterpolationMode.BILINEAR)
        for image, angle, (x, y), zoom in zip(images, angles, shifts, zooms, strict=True)
    ]
    exact = torch.stack(theirs)
    # A place is rounded in units of the image's side, and moving by one pixel may change a value by all of its range.
    assert_within_budget(warp(images, geometry, "zeros"), exact, exact, ulps=4 * max(shape))


def test_crop_is_resized_crop() -> None:
    """Inside: at its rim our crop sees the pixels next to it, where torchvision repeats the last one."""
    size, boxes = 24, [(0, 0, 24, 24), (2, 3, 12, 12), (4, 0, 16, 20), (5, 9, 12, 8), (12, 12, 12, 12), (1, 2, 18, 9)]
    top, left, high, wide = (torch.tensor(column, dtype=torch.float32) for column in zip(*boxes, strict=True))
    geometry = still(
        crop_width=wide / size,
        crop_height=high / size,
        crop_x=(2 * left + wide) / size - 1,
        crop_y=(2 * top + high) / size - 1,
    )

    def theirs(images: Tensor) -> Tensor:
        return torch.stack(
            [TV.resized_crop(image, *box, [size, size]) for image, box in zip(images, boxes, strict=True)]
        )[..., 2:-2, 2:-2]

    def ours(images: Tensor) -> Tensor:
        return warp(images, geometry, "border")[..., 2:-2, 2:-2]

    hold(pictures(), ours, theirs)


def test_flip() -> None:
    flip = torch.tensor([-1.0, 1, -1, 1, 1, -1])
    images = pictures()
    expected = torch.where((flip < 0).view(-1, 1, 1, 1), TV.horizontal_flip(images), images)
    assert_within_budget(warp(images, still(flip=flip), "border"), expected, expected.double(), ulps=4 * 24)


def test_flip_comes_last() -> None:
    """A flipped image is the mirror of what the other parameters give."""
    other = {
        "angle": torch.full((BATCH,), 0.3),
        "shift_x": torch.full((BATCH,), 0.1),
        "crop_x": torch.full((BATCH,), 0.2),
    }
    other["crop_width"] = torch.full((BATCH,), 0.7)
    plain = warp(pictures().double(), double(still(**other)), "zeros")
    mirrored = warp(pictures().double(), double(still(**other, flip=-torch.ones(BATCH))), "zeros")
    assert_within_budget(mirrored.flip(-1), plain, plain, ulps=4 * 24)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_contrast_saturation(channels: int) -> None:
    factors = torch.tensor([0.2, 0.6, 1.0, 1.3, 1.7, 2.0])
    images = pictures(channels)
    for position, theirs in enumerate((TV.adjust_brightness, TV.adjust_contrast, TV.adjust_saturation)):
        chosen = [None, None, None]
        chosen[position] = factors

        def each(x: Tensor, theirs: Callable[[Tensor, float], Tensor] = theirs) -> Tensor:
            return torch.stack([theirs(image, factor) for image, factor in zip(x, factors.tolist(), strict=True)])

        hold(images, lambda x, chosen=chosen: adjust(x, *chosen), each)


@pytest.mark.parametrize("shape", [(24, 24), (9, 30)])
@pytest.mark.parametrize("largest", [0.5, 1.0, 2.0])
def test_blur(shape: tuple[int, int], largest: float) -> None:
    sigmas = torch.linspace(0.1, largest, BATCH)
    radius = blur_radius(largest)

    def theirs(x: Tensor) -> Tensor:
        width = 2 * radius + 1
        return torch.stack(
            [TV.gaussian_blur(image, [width, width], [s, s]) for image, s in zip(x, sigmas.tolist(), strict=True)]
        )

    hold(pictures(3, *shape), lambda x: gaussian_blur(x, sigmas, radius), theirs)


def test_blur_of_zero_width_changes_nothing() -> None:
    images = pictures()
    assert torch.equal(gaussian_blur(images, torch.zeros(BATCH), 3), images)


def test_noise() -> None:
    images, sigma = pictures(), 0.1
    torch.manual_seed(5)
    theirs = TV.gaussian_noise(images, 0.0, sigma)
    normal = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    ours = add_noise(images, torch.full((BATCH,), sigma), normal)
    assert_within_budget(ours, theirs, theirs.double())


def geometry_of(uniform: Tensor, config: AugmentConfig) -> Geometry:
    return Geometry.of_numbers(in_ranges(uniform, config), config)


def test_a_crop_alone_has_the_matrix_of_a_neutral_rest() -> None:
    uniform = torch.rand(NUMBERS, 50, generator=torch.Generator().manual_seed(2))
    crop = geometry_of(uniform, AugmentConfig())
    assert crop.in_place
    assert torch.equal(crop.matrices(20, 30), replace(crop, in_place=False).matrices(20, 30))
    for moved in ({"zoom": (1.0, 1.5)}, {"rotation": 5.0}, {"shift": 0.1}):
        assert not geometry_of(uniform, AugmentConfig(**moved)).in_place  # type: ignore[arg-type]
