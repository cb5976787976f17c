"""Ranges of the augmentations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from anomem.validation import require, require_choice

Padding = Literal["zeros", "border", "reflection"]
PADDINGS = ("zeros", "border", "reflection")


@dataclass
class AugmentConfig:
    """What is drawn, and from where, for each image. The defaults are the paper's list for natural images.

    Every number is drawn uniformly from its range; a range that starts and ends at the neutral value is not computed.

    Attributes:
        crop_area: area of the random resized crop as a share of the image, in (0, 1].
        crop_ratio: its width over its height; drawn uniformly in the logarithm.
        flip: probability of a horizontal flip.
        zoom: magnification about the centre, after the crop; 1 is none.
        rotation: largest rotation in degrees, either way.
        shift: largest shift as a fraction of the side, either way, on each axis.
        padding: what lies outside of the image: "zeros", "border" or "reflection".
        brightness: factors from 1 − b to 1 + b.
        contrast: factors from 1 − c to 1 + c about the image's mean grey.
        saturation: factors from 1 − s to 1 + s about each pixel's grey; images of one channel have none.
        jitter: probability that an image gets brightness, contrast and saturation.
        blur: probability of a Gaussian blur.
        blur_sigma: its standard deviation in pixels.
        noise: largest standard deviation of Gaussian noise, in units of the [0, 1] image.
    """

    crop_area: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    zoom: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    shift: float = 0.0
    padding: Padding = "reflection"
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    jitter: float = 0.8
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    noise: float = 0.05

    @staticmethod
    def for_dataset(name: str) -> AugmentConfig:
        """The preset of a data set: METHOD.md's trial for digits, the paper's list for anything else.

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
    def nothing() -> AugmentConfig:
        """Ranges that leave every image as it is; a place to start from."""
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

    def validate(self) -> None:
        """Check every range.

        Raises:
            ArgumentError: a probability outside of [0, 1], an empty or negative range, an unknown padding.
        """
        for name in ("flip", "jitter", "blur"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, "a probability from 0 to 1", value)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                right = len(value) == 2 and 0 < value[0] <= value[1]
                require(right, field.name, "two numbers, 0 < low ≤ high", value)
        require(self.crop_area[1] <= 1, "crop_area", "shares of at most 1", self.crop_area)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, "a number from 0 to 1", value)
        for name in ("rotation", "shift", "noise"):
            value = getattr(self, name)
            require(value >= 0, name, "a number ≥ 0", value)
        require_choice(self.padding, "padding", PADDINGS)
