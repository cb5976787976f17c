"""The random augmentation of a batch: draws the parameters of every view; `anomem.functional.augment` applies them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.augment.config import AugmentConfig
from anomem.reference import ViewParameters, blur_radius
from anomem.reference.augment import is_traced
from anomem.rules import Impl, is_fake
from anomem.validation import require, require_images


class Augmentation:
    """Draws parameters for each image and applies them to the batch on its device.

    It never waits for the device, and the same generator state gives the same bits.

    Args:
        config: the ranges.
        impl: implementation of the operator; where it has no such kernel, the choice is that of "auto".

    Example:
        >>> augmentation = Augmentation(AugmentConfig.for_dataset("digits"))
        >>> generator = torch.Generator(images.device).manual_seed(0)
        >>> views = augmentation(images, generator)  # [B, C, H, W] uint8 -> float32 in [0, 1]
    """

    def __init__(self, config: AugmentConfig, impl: Impl = "auto") -> None:
        self.config, self.impl = config, impl

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each image.

        Args:
            images: [B, C, H, W] uint8, or float in [0, 1].
            generator: source of randomness on the images' device.

        Returns:
            [B, C, H, W] float32 in [0, 1].

        Raises:
            ArgumentError: no such images, or a generator on another device.
        """
        require_images_and_generator(images, generator)
        x = images.float() if images.is_floating_point() else images
        return self.apply(x, *self.draw(len(x), generator))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The random numbers of so many views.

        Args:
            count: V.
            generator: source of randomness.

        Returns:
            Uniform numbers [16, V], and the keys of the noise [V] int64.
        """
        device = generator.device
        uniform = torch.rand(NUMBERS, count, generator=generator, device=device)
        return uniform, torch.randint(2**63 - 1, (count,), generator=generator, device=device)

    @torch.no_grad()
    def apply(
        self,
        images: Tensor,
        uniform: Tensor,
        keys: Tensor,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """The views that random numbers make.

        Args:
            images: [B, C, H, W] uint8, or float32 in [0, 1].
            uniform: [16, V], from `draw`, V a multiple of B; view v is of image v mod B.
            keys: [V], from `draw`.
            memory_format: of the views: contiguous or channels-last.

        Returns:
            [V, C, H, W] float32 in [0, 1].
        """
        parameters = self.parameters(uniform, keys, *images.shape[-2:])
        if len(images) and all(given is None for given in parameters):  # which says nothing of the number of views
            images = images.repeat(len(keys) // len(images), 1, 1, 1)
        return AF.augment(
            images,
            parameters,
            padding=self.config.padding,
            radius=blur_radius(self.config.blur_sigma[1]),
            memory_format=memory_format,
            impl=self.impl,
            part=True,
        )

    def parameters(self, uniform: Tensor, keys: Tensor, height: int, width: int) -> ViewParameters:
        """The parameters that random numbers make; None for what the configuration leaves as it is.

        Args:
            uniform: [16, V], from `draw`.
            keys: [V], from `draw`.
            height: of the images in pixels.
            width: likewise.
        """
        config = self.config
        numbers = in_ranges(uniform, config)
        jittered, (blurred, sigma, noise) = numbers[9], numbers[13:].unbind()
        spreads = config.brightness, config.contrast, config.saturation
        factors: list[Tensor | None] = [None, None, None]
        if config.jitter > 0 and any(spreads):
            changed = numbers[10:13].mul(jittered < 0).add_(1).unbind()
            factors = [factor if spread > 0 else None for factor, spread in zip(changed, spreads, strict=True)]
        brightness, contrast, saturation = factors
        return ViewParameters(
            matrices=Geometry.of_numbers(numbers, config).matrices(height, width) if moves(config) else None,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            blur=sigma * (blurred < 0) if config.blur > 0 else None,
            noise=noise if config.noise > 0 else None,
            keys=keys if config.noise > 0 else None,
        )


def require_images_and_generator(images: Tensor, generator: torch.Generator) -> None:
    """Images [B, C, H, W], and a source of randomness on their device."""
    require_images(images, "images")
    right = isinstance(generator, torch.Generator)
    require(right, "generator", "a torch.Generator", lambda: type(generator).__name__)
    same = generator.device.type == images.device.type
    require(same, "generator", lambda: f"a generator on {images.device}", generator.device)


@dataclass
class Geometry:
    """Crop, zoom, rotation, shift and flip of each image: nine parameters, each [B] float32.

    Attributes:
        crop_width: width of the crop over the image's.
        crop_height: height of the crop over the image's.
        crop_x: centre of the crop, from −1 (left edge of the image) to 1.
        crop_y: centre of the crop, from −1 (top edge) to 1.
        flip: a negative number mirrors left and right, any other does not.
        zoom: magnification about the centre of the crop.
        angle: radians, clockwise as seen.
        shift_x: to the right, as a fraction of the width.
        shift_y: downwards, as a fraction of the height.
        in_place: whether zoom, angle and shift are neutral.
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
    in_place: bool = False

    @staticmethod
    def of_numbers(numbers: Tensor, config: AugmentConfig) -> Geometry:
        """Parameters from random numbers [16, B] in their ranges."""
        area, half_log_ratio, x, y, flipped, zoom, angle, shift_x, shift_y, *_ = numbers.unbind()
        root, stretch = area.sqrt(), half_log_ratio.exp()
        width, height = (root * stretch).clamp_max_(1), (root / stretch).clamp_max_(1)
        return Geometry(
            crop_width=width,
            crop_height=height,
            crop_x=torch.addcmul(x, x, width, value=-1),
            crop_y=torch.addcmul(y, y, height, value=-1),
            flip=flipped,
            zoom=zoom,
            angle=angle,
            shift_x=shift_x,
            shift_y=shift_y,
            in_place=config.zoom == (1.0, 1.0) and config.rotation == config.shift == 0,
        )

    def matrices(self, height: int, width: int) -> Tensor:
        """[B, 2, 3]: the place in the image that each output pixel is read from, both in [−1, 1] coordinates.

        An output pixel is mirrored, then shifted back, rotated back and shrunk by the zoom, then placed in the crop.
        Rotation is in pixels, so that it does not shear an image that is not square.
        """
        if self.in_place:
            rest = torch.zeros_like(self.flip)
            rows = [self.crop_width.copysign(self.flip), rest, self.crop_x, rest, self.crop_height, self.crop_y]
            return torch.stack(rows, 1).view(-1, 2, 3)
        flip = torch.ones_like(self.flip).copysign_(self.flip)
        cosine, sine = self.angle.cos() / self.zoom, self.angle.sin() / self.zoom
        aspect = width / height
        a, b, c, d = cosine, sine / aspect, -sine * aspect, cosine
        x, y = -2 * self.shift_x, -2 * self.shift_y
        rows = [
            self.crop_width * a * flip,
            self.crop_width * b,
            self.crop_width * (a * x + b * y) + self.crop_x,
            self.crop_height * c * flip,
            self.crop_height * d,
            self.crop_height * (c * x + d * y) + self.crop_y,
        ]
        return torch.stack(rows, 1).view(-1, 2, 3)


def moves(config: AugmentConfig) -> bool:
    """Whether the configuration moves pixels at all."""
    still = config.crop_area == config.crop_ratio == config.zoom == (1.0, 1.0)
    return not (still and config.flip == config.rotation == config.shift == 0)


NUMBERS = 16
"""Random numbers of a view, in the order of `_bounds`."""


def in_ranges(uniform: Tensor, config: AugmentConfig) -> Tensor:
    """The random numbers of views in the ranges of a configuration; one of a probability is negative where it is drawn.

    One operator: beside the kernel's, each of the many small ones would count.

    Args:
        uniform: [16, V] in [0, 1).
        config: the ranges.

    Returns:
        [16, V].
    """
    if is_traced() or is_fake(uniform):
        low, extent = uniform.new_tensor(_bounds(config), dtype=torch.float32).unsqueeze(2)
    else:
        low, extent = _kept_bounds(config, uniform.device)
    return torch.addcmul(low, uniform, extent)


def _bounds(config: AugmentConfig) -> list[list[float]]:
    """[2, 16]: the lower bounds of the random numbers, and the extents of their ranges."""
    ranges = (
        config.crop_area,
        [0.5 * math.log(ratio) for ratio in config.crop_ratio],
        _either_way(1.0),
        _either_way(1.0),
        _drawn(config.flip),
        config.zoom,
        _either_way(math.radians(config.rotation)),
        _either_way(config.shift),
        _either_way(config.shift),
        _drawn(config.jitter),
        _either_way(config.brightness),
        _either_way(config.contrast),
        _either_way(config.saturation),
        _drawn(config.blur),
        config.blur_sigma,
        (0.0, config.noise),
    )
    return [[low for low, _ in ranges], [high - low for low, high in ranges]]


@functools.lru_cache(maxsize=16)
def _kept_bounds(config: AugmentConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as [16, 1]. A copy to an accelerator waits for the device, and no graph captures one: made once."""
    with torch.inference_mode(False):
        low, extent = torch.tensor(_bounds(config), dtype=torch.float32, device="cpu").unsqueeze(2).to(device)
    return low, extent


def _either_way(spread: float) -> tuple[float, float]:
    return -spread, spread


def _drawn(probability: float) -> tuple[float, float]:
    return -probability, 1 - probability
