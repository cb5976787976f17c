"""The augmentation of images from given parameters."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import without_autocast
from anomem.ops.library import accumulator
from anomem.reference import Padding, ViewParameters
from anomem.rules import Impl
from anomem.validation import require, require_choice, require_count, require_images, require_same_device

LARGEST_SIDE = 1 << 14
"""Pixels of an image's side."""


def augment(
    images: Tensor,
    parameters: ViewParameters,
    *,
    padding: Padding = "zeros",
    radius: int = 6,
    memory_format: torch.memory_format = torch.contiguous_format,
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """Views of images: warped, then changed in brightness, contrast and saturation, then blurred, then noisy.

    The noise of a pixel depends on its view's key and its place alone, not on the batch, the device or the
    implementation. No gradient.

    Args:
        images: [B, C, H, W] uint8, or float in [0, 1]; any strides.
        parameters: of V views, V a multiple of B; view v is of image v mod B. Without any, V is B.
        padding: pixels outside of an image: "zeros", "border" or "reflection".
        radius: of the blur's filter in pixels; less where a side is shorter.
        memory_format: of the views: contiguous or channels-last.
        impl: "auto", "reference" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        [V, C, H, W] float32 (float64 for float64) in [0, 1].

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.

    Example:
        >>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> views = augment(images, ViewParameters(brightness=torch.rand(16)))  # two views of every image
        >>> views.shape
        torch.Size([16, 3, 32, 32])
    """
    require_images(images, "images")
    channels, height, width = images.shape[1:]
    right = channels > 0 and 0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE
    require(right, "images", f"at least one channel, and sides from 1 to {LARGEST_SIDE} pixels", images)
    require_choice(padding, "padding", get_args(Padding))
    require_count(radius, "radius", 0)
    formats = (torch.contiguous_format, torch.channels_last)
    require(memory_format in formats, "memory_format", "contiguous_format or channels_last", memory_format)
    views = _views(parameters, images)
    features = channels * height * width
    problem = rules.problem_of("augment", images, *parameters, features=features, rows=views)
    chosen = backends.choose(problem, impl, part=part)
    radius = min(radius, height - 1, width - 1)
    with torch.no_grad(), without_autocast(images.device.type):
        if chosen == "reference":
            x = images.to(accumulator(images)) if images.is_floating_point() else images
            made = reference.augment(x, parameters, padding, radius).contiguous(memory_format=memory_format)
            return made.clone() if made is images else made
        from anomem.ops import augment as operators

        dtypes = [torch.int64 if name == "keys" else torch.float32 for name in ViewParameters._fields]
        operands = ViewParameters(
            *(
                None if given is None else given.to(dtype).contiguous()
                for given, dtype in zip(parameters, dtypes, strict=True)
            )
        )
        return operators.augment(images, operands, views, radius, padding, memory_format == torch.channels_last)


def _views(parameters: ViewParameters, images: Tensor) -> int:
    """V, after checking the parameters."""
    require(isinstance(parameters, ViewParameters), "parameters", "a ViewParameters", lambda: type(parameters).__name__)
    both = (parameters.noise is None) == (parameters.keys is None)
    require(both, "keys", "keys together with noise", "one of the two")
    batch, views = len(images), None
    for name, given in zip(ViewParameters._fields, parameters, strict=True):
        if given is None:
            continue
        _require_entries(given, name, images)
        views = len(given) if views is None else views
        _require_views(given, name, views, batch)
    return batch if views is None else views


def _require_entries(given: Tensor, name: str, images: Tensor) -> None:
    require(isinstance(given, Tensor), name, "a tensor", lambda: type(given).__name__)
    require(given.dim() > 0, name, "one entry a view", given)
    right = given.dtype == torch.int64 if name == "keys" else given.is_floating_point()
    require(right, name, "int64" if name == "keys" else "a floating tensor", given.dtype)
    require_same_device(given, name, images, "images")


def _require_views(given: Tensor, name: str, views: int, batch: int) -> None:
    shape = (views, 2, 3) if name == "matrices" else (views,)
    require(given.shape == shape, name, lambda: f"shape {list(shape)}", given)
    right = views % batch == 0 if batch else views == 0
    require(right, name, lambda: f"a multiple of {batch} entries, equally many views of every image", given)
