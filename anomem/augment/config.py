"""Settings of the augmentation: the ranges of its random parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from anomem.reference import Padding
from anomem.validation import require, require_choice, require_pair, require_setting


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of the random parameters, uniform and drawn for each image; a range at its neutral value costs nothing.

    Raises:
        ArgumentError: a probability outside of [0, 1], an empty or negative range, an unknown padding.
    """

    crop_area: tuple[float, float] = (0.3, 1.0)
    """Area of the random resized crop as a share of the image, in (0, 1]."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop; uniform in the logarithm."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Magnification about the centre, after the crop; 1 is neutral."""
    rotation: float = 0.0
    """Largest rotation in degrees, either way."""
    shift: float = 0.0
    """Largest shift as a fraction of the side, either way, on each axis."""
    padding: Padding = "reflection"
    """Pixels outside of the image."""
    brightness: float = 0.4
    """Factors from 1 - b to 1 + b."""
    contrast: float = 0.4
    """Factors from 1 - c to 1 + c about the image's mean grey."""
    saturation: float = 0.4
    """Factors from 1 - s to 1 + s about each pixel's grey; one-channel images are left as they are."""
    jitter: float = 0.8
    """Probability that an image gets brightness, contrast and saturation."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Its standard deviation in pixels."""
    noise: float = 0.05
    """Largest standard deviation of Gaussian noise, in units of the [0, 1] image."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "blur"):
            value = getattr(self, name)
            require_setting(value, f"augment.{name}")
            require(0 <= value <= 1, f"augment.{name}", "a probability from 0 to 1", value)
        for name in ("crop_area", "crop_ratio", "zoom", "blur_sigma"):
            value = getattr(self, name)
            require_pair(value, f"augment.{name}", "two numbers, 0 < low ≤ high")
            require(0 < value[0] <= value[1], f"augment.{name}", "two numbers, 0 < low ≤ high", value)
            object.__setattr__(self, name, tuple(value))  # a list may be given
        require(self.crop_area[1] <= 1, "augment.crop_area", "shares of at most 1", self.crop_area)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require_setting(value, f"augment.{name}")
            require(0 <= value <= 1, f"augment.{name}", "a number from 0 to 1", value)
        for name, most in (("rotation", 360), ("shift", 10), ("noise", 10)):
            value = getattr(self, name)
            require_setting(value, f"augment.{name}")
            require(0 <= value <= most, f"augment.{name}", f"a number from 0 to {most}", value)
        require_choice(self.padding, "augment.padding", get_args(Padding))

    @staticmethod
    def for_dataset(name: str) -> AugmentConfig:
        """The preset of a data set: small shifts and rotations for digits, the paper's list for any other.

        Args:
            name: as in `DataConfig.dataset`.
        """
        if name == "digits":
            return AugmentConfig(
                crop_area=(1.0, 1.0),
                crop_ratio=(1.0, 1.0),
                flip=0.0,
                zoom=(0.85, 1.15),
                rotation=10.0,
                shift=0.12,
                padding="zeros",
                brightness=0.2,
                contrast=0.2,
                saturation=0.0,
                jitter=1.0,
                blur=0.5,
                blur_sigma=(0.1, 1.0),
                noise=0.1,
            )
        return AugmentConfig()

    @staticmethod
    def light() -> AugmentConfig:
        """Small variations without crops and flips, for parts that lie alike in every image."""
        return AugmentConfig(
            crop_area=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip=0.0,
            brightness=0.13,
            contrast=0.13,
            saturation=0.13,
            blur=0.0,
            noise=0.017,
        )

    @staticmethod
    def nothing() -> AugmentConfig:
        """Ranges that leave every image unchanged, to start from."""
        return AugmentConfig(
            crop_area=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip=0.0,
            brightness=0.0,
            contrast=0.0,
            saturation=0.0,
            blur=0.0,
            noise=0.0,
        )
