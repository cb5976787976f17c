"""Patches of scikit-image's photographs: a texture against other pictures, or against local defects with masks."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from anomem.data.config import DataConfig, Defect
from anomem.data.convert import as_uint8, resize, resize_masks
from anomem.data.images import ResidentImages
from anomem.data.task import Task, assemble, class_index, generator, outlier_count
from anomem.errors import optional
from anomem.validation import require, require_choice

TEXTURES = ("brick", "grass", "gravel")
# Shipped in scikit-image's wheel beside the textures, so nothing is downloaded.
PHOTOGRAPHS = ("camera", "coins", "moon", "page", "text", "clock", "astronaut", "coffee", "chelsea", "rocket")
DEFECTS: tuple[str, ...] = get_args(Defect)
PATCH = 64


def textures_task(config: DataConfig) -> Task:
    """One texture as the normal class; `DataConfig.anomalies` says what is anomalous.

    Labelled anomalies for training, if any, come from the halves of the photographs that are not tested on, or are
    defects on training patches.
    """
    normal = TEXTURES[class_index(config.normal, TEXTURES)]
    source = generator(config.seed)
    train_part, test_part = split_picture(photograph(normal), config.test_fraction, source)
    train = patches(train_part, config.train_patches, source)
    test = patches(test_part, config.test_patches, source)
    labelled = outlier_count(len(train), config.outlier_ratio, len(train))
    masks: Tensor | None = None
    if config.anomalies == "photographs":
        anomalous, kinds = _other_pictures(normal, config.test_patches, source, "test")
        outliers, _ = _other_pictures(normal, labelled, source, "train")
    else:
        names = DEFECTS if config.anomalies == "defects" else (config.anomalies,)
        anomalous, marks, kinds = _damaged(patches(test_part, config.test_patches, source), names, source)
        outliers, _, _ = _damaged(patches(train_part, labelled, source), names, source)
        masks = resize_masks(torch.cat([torch.zeros_like(marks), marks]), config.image_size)
    return assemble(
        f"textures {normal}",
        normal,
        ResidentImages(resize(torch.cat([train, outliers]), config.image_size)),
        torch.arange(len(train) + len(outliers)) < len(train),
        ResidentImages(resize(torch.cat([test, anomalous]), config.image_size)),
        [normal] * len(test) + kinds,
        torch.arange(len(test) + len(anomalous)) >= len(test),
        aligned=bool(config.aligned),
        test_masks=masks,
    )


def photograph(name: str) -> Tensor:
    """One bundled photograph in grey: [H, W] uint8."""
    with optional("the data set textures"):
        from skimage import data
    from PIL import Image

    return as_uint8(Image.fromarray(getattr(data, name)()).convert("L"))[0]


def patches(picture: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Patches at uniformly random places.

    Args:
        picture: [H, W] uint8, both sides ≥ 64.
        count: number of patches.
        source: generator of the places.

    Returns:
        [count, 1, 64, 64] uint8.
    """
    windows = picture.unfold(0, PATCH, 1).unfold(1, PATCH, 1)  # [H', W', 64, 64], a view
    rows = torch.randint(windows.shape[0], (count,), generator=source)
    columns = torch.randint(windows.shape[1], (count,), generator=source)
    return windows[rows, columns][:, None]


def split_picture(picture: Tensor, test_fraction: float, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut a strip for testing off one of the four sides; no pixel is in both parts.

    Args:
        picture: [H, W].
        test_fraction: share of the strip.
        source: picks the side.

    Returns:
        The part to train on and the part to test on.
    """
    turns = int(torch.randint(4, (), generator=source))
    turned = torch.rot90(picture, turns)
    strip = round(len(turned) * test_fraction)
    require(
        PATCH <= strip <= len(turned) - PATCH,
        "data.test_fraction",
        lambda: f"from {PATCH / len(turned):.3g} to {1 - PATCH / len(turned):.3g}, so that patches of {PATCH} fit",
        test_fraction,
    )
    return torch.rot90(turned[strip:], -turns), torch.rot90(turned[:strip], -turns)


def add_defect(image: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image with one local defect; outside of the mask every pixel is kept.

    Args:
        image: [1, H, W] uint8 on the CPU.
        kind: "scratch" (a thin bent line, lighter or darker), "blot" (a round stain) or "cut_paste" (a rectangle
            taken from elsewhere in the image, mirrored).
        generator: source of randomness.

    Returns:
        The image [1, H, W] uint8 and the mask [H, W] bool of the pixels that were painted over.

    Raises:
        ArgumentError: another kind.
    """
    require_choice(kind, "kind", DEFECTS)
    if kind == "cut_paste":
        return _cut_paste(image, generator)
    height, width = image.shape[-2:]
    side = min(height, width)
    u, v = _line_coordinates(height, width, generator)
    if kind == "scratch":
        half_length = side * _uniform(generator, 0.25, 0.45)
        bend = _uniform(generator, -0.5, 0.5) / side  # of the parabola v = bend · u²
        half_width = _uniform(generator, 0.75, 1.6)
        inside = (u.abs() <= half_length) & ((v - bend * u.square()).abs() <= half_width)
        strength = 1.0
    else:
        radius, stretch = side * _uniform(generator, 0.08, 0.18), _uniform(generator, 0.7, 1.4)
        inside = (u / stretch).square() + (v * stretch).square() <= radius**2
        strength = _uniform(generator, 0.5, 0.8)
    pixels = image[0].float()
    # Away from the local brightness, so that the defect is visible.
    local = float(pixels[inside].mean())
    step = _uniform(generator, 50.0, 110.0)
    target = local + step if local < 128 else local - step
    painted = pixels + inside * strength * (target - pixels)
    return painted.clamp(0, 255).round().to(torch.uint8)[None], inside


def _cut_paste(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    height, width = image.shape[-2:]
    rows, columns = (max(2, round(size * _uniform(generator, 0.15, 0.35))) for size in (height, width))
    top, from_top = (int(_uniform(generator, 0, height - rows + 1)) for _ in range(2))
    left, from_left = (int(_uniform(generator, 0, width - columns + 1)) for _ in range(2))
    result, mask = image.clone(), torch.zeros(height, width, dtype=torch.bool)
    piece = image[:, from_top : from_top + rows, from_left : from_left + columns].flip(1)
    result[:, top : top + rows, left : left + columns] = piece
    mask[top : top + rows, left : left + columns] = True
    return result, mask


def _line_coordinates(height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixel coordinates u along and v across a line of random direction near the middle, each [H, W]."""
    y = torch.arange(height).float()[:, None] - height * _uniform(generator, 0.25, 0.75)
    x = torch.arange(width).float()[None, :] - width * _uniform(generator, 0.25, 0.75)
    angle = _uniform(generator, 0.0, math.pi)
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _other_pictures(normal: str, count: int, source: torch.Generator, part: str) -> tuple[Tensor, list[str]]:
    """Patches of the other textures and of the photographs, in turn; training and testing use different halves."""
    names = [name for name in (*TEXTURES, *PHOTOGRAPHS) if name != normal]
    kinds = [names[i % len(names)] for i in range(count)]
    pictures = {}
    for name in set(kinds):
        picture = photograph(name)
        halves = picture.tensor_split(2, dim=0 if picture.shape[0] > picture.shape[1] else 1)
        pictures[name] = halves[0 if part == "train" else 1]
    found = [patches(pictures[kind], 1, source) for kind in kinds]
    return torch.cat([*found, torch.empty(0, 1, PATCH, PATCH, dtype=torch.uint8)]), kinds


def _damaged(images: Tensor, names: tuple[str, ...], source: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Images [N, 1, H, W] with one defect each, masks [N, H, W] and the defects' names."""
    result, masks = images.clone(), torch.zeros_like(images[:, 0], dtype=torch.bool)
    kinds = [names[i % len(names)] for i in range(len(images))]
    for i, kind in enumerate(kinds):
        result[i], masks[i] = add_defect(images[i], kind, source)
    return result, masks, kinds
