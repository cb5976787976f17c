"""The drawn augmentation: reproducible, one set of parameters per image, within its ranges."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.augment import Augmentation, AugmentConfig
from anomem.augment.augmentation import NUMBERS, Geometry, in_ranges
from anomem.errors import ArgumentError

CONFIGS = {"digits": AugmentConfig.for_dataset("digits"), "natural": AugmentConfig.for_dataset("cifar10")}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (8, channels, 20, 20), dtype=torch.uint8, generator=seeded(1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_generator_same_bits(name: str, channels: int) -> None:
    augmentation = Augmentation(CONFIGS[name])
    first, second = (augmentation(pictures(channels), seeded()) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augmentation(pictures(channels), seeded(4)))
    assert first.dtype == torch.float32
    assert first.shape == (8, channels, 20, 20)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_global_generator_is_not_touched(name: str) -> None:
    before = torch.get_rng_state()
    Augmentation(CONFIGS[name])(pictures(), seeded())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_image_has_its_own_parameters(name: str) -> None:
    same = pictures()[:1].expand(8, -1, -1, -1)
    views = Augmentation(replace(CONFIGS[name], noise=0.0))(same, seeded())
    assert len(views.flatten(1).unique(dim=0)) == 8


def test_uint8_and_float_agree() -> None:
    augmentation = Augmentation(CONFIGS["natural"])
    pixels = pictures()
    assert torch.equal(augmentation(pixels, seeded()), augmentation(pixels.float().mul(1 / 255), seeded()))


def test_nothing_changes_nothing_and_copies() -> None:
    images = pictures().float().div(255)
    view = Augmentation(AugmentConfig.nothing())(images, seeded())
    assert torch.equal(view, images)
    assert view.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig.nothing()])
def test_as_many_views_as_were_drawn(config: AugmentConfig) -> None:
    images = torch.randint(0, 256, (3, 2, 5, 6), dtype=torch.uint8)
    augmentation = Augmentation(config)
    views = augmentation.apply(images, *augmentation.draw(6, torch.Generator().manual_seed(0)))
    assert views.shape == (6, 2, 5, 6)
    if config == AugmentConfig.nothing():
        torch.testing.assert_close(views, images.repeat(2, 1, 1, 1) / 255)


@pytest.mark.parametrize(
    "changed",
    [
        {"crop_area": (0.3, 0.8)}, {"flip": 0.5}, {"zoom": (0.8, 1.2)}, {"rotation": 20.0}, {"shift": 0.2},
        {"brightness": 0.4}, {"contrast": 0.4}, {"saturation": 0.4}, {"blur": 1.0}, {"noise": 0.1},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_each_option_alone_does_something(changed: dict[str, object]) -> None:
    images = pictures().float().div(255)
    view = Augmentation(replace(AugmentConfig.nothing(), **changed))(images, seeded())
    assert not torch.equal(view, images)


def test_jitter_and_blur_leave_the_images_that_were_not_drawn() -> None:
    images = pictures().float().div(255)
    config = replace(AugmentConfig.nothing(), brightness=0.4, contrast=0.4, saturation=0.4, jitter=0.5)
    unchanged = (Augmentation(config)(images, seeded()) - images).abs().amax((1, 2, 3)) < 1e-6
    assert 0 < int(unchanged.sum()) < 8
    blurred = Augmentation(replace(AugmentConfig.nothing(), blur=0.5))(images, seeded())
    assert 0 < int((blurred == images).all(3).all(2).all(1).sum()) < 8


def test_parameters_stay_in_their_ranges_and_crops_in_the_image() -> None:
    config = AugmentConfig(crop_area=(0.2, 0.6), zoom=(0.9, 1.2), rotation=15.0, shift=0.1, flip=0.3)
    numbers = in_ranges(torch.rand(NUMBERS, 20_000, generator=seeded()), config)
    geometry = Geometry.of_numbers(numbers, config)
    assert float((geometry.crop_x.abs() + geometry.crop_width).max()) <= 1 + 1e-6
    assert float((geometry.crop_y.abs() + geometry.crop_height).max()) <= 1 + 1e-6
    area = geometry.crop_width * geometry.crop_height
    assert 0.2 - 1e-6 <= float(area.min()) < float(area.max()) <= 0.6 + 1e-6
    ratio = geometry.crop_width / geometry.crop_height
    assert 3 / 4 - 1e-6 <= float(ratio.min()) < float(ratio.max()) <= 4 / 3 + 1e-6
    assert abs(float((geometry.flip < 0).float().mean()) - 0.3) < 0.02
    assert 0.9 <= float(geometry.zoom.min()) < float(geometry.zoom.max()) <= 1.2
    assert float(geometry.angle.abs().max()) <= torch.pi / 12
    assert float(geometry.shift_x.abs().max()) <= 0.1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flip": 1.5}, "`augment.flip`: expected a probability from 0 to 1, received 1.5"),
        ({"crop_area": (0.5, 1.2)}, "`augment.crop_area`: expected shares of at most 1"),
        ({"zoom": (1.2, 0.8)}, "`augment.zoom`: expected two numbers"),
        ({"blur_sigma": (0.1, float("inf"))}, "`augment.blur_sigma`: expected two numbers"),
        ({"crop_ratio": (1.0,)}, "`augment.crop_ratio`: expected two numbers"),
        ({"brightness": 1.5}, "`augment.brightness`: expected a number from 0 to 1, received 1.5"),
        ({"rotation": float("nan")}, "`augment.rotation`: expected a finite number, received nan"),
        ({"noise": -0.1}, "`augment.noise`: expected a number from 0 to 10, received -0.1"),
        (
            {"padding": "mirror"},
            "`augment.padding`: expected one of 'zeros', 'border', 'reflection', received 'mirror'",
        ),
    ],
)
def test_bad_ranges(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AugmentConfig(**changed)
    with pytest.raises(ArgumentError, match=message):
        replace(AugmentConfig(), **changed)


def test_a_range_may_be_a_list() -> None:
    listed = AugmentConfig(crop_area=[0.3, 1.0], zoom=[0.9, 1.1])  # type: ignore[arg-type]
    assert listed == AugmentConfig(zoom=(0.9, 1.1))
    assert Augmentation(listed)(pictures(), seeded()).shape == (8, 3, 20, 20)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        AugmentConfig().flip = 1.0  # type: ignore[misc]


def test_bad_images() -> None:
    augmentation = Augmentation(AugmentConfig())
    with pytest.raises(ArgumentError, match=r"`images`: expected a tensor \[B, C, H, W\], received shape \[3, 8, 8\]"):
        augmentation(torch.zeros(3, 8, 8), seeded())
    with pytest.raises(ArgumentError, match=r"expected uint8, or float in \[0, 1\], received torch.int64"):
        augmentation(torch.zeros(1, 3, 8, 8, dtype=torch.int64), seeded())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_without_waiting(name: str) -> None:
    augmentation, images = Augmentation(CONFIGS[name]), pictures().cuda()
    first = augmentation(images, torch.Generator("cuda").manual_seed(3))  # fills the cache of blur matrices
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = augmentation(images, torch.Generator("cuda").manual_seed(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


def test_an_empty_batch_stays_empty() -> None:
    views = Augmentation(AugmentConfig())(torch.zeros(0, 3, 8, 8), torch.Generator())
    assert views.shape == (0, 3, 8, 8)


def test_what_is_no_batch_is_told_in_one_line() -> None:
    augmentation = Augmentation(AugmentConfig())
    with pytest.raises(ArgumentError, match=r"`images`: expected .*, received ndarray$"):
        augmentation(torch.zeros(2, 3, 8, 8).numpy(), torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"`generator`: expected a torch\.Generator, received NoneType$"):
        augmentation(torch.zeros(2, 3, 8, 8), None)  # type: ignore[arg-type]
