"""Patches of scikit-image's bundled photographs: a texture against other pictures, or against defects of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.data.config import DataConfig
from anomem.data.convert import resize, resize_masks
from anomem.data.defects import DEFECTS, add_defect
from anomem.data.images import ResidentImages
from anomem.data.optional import optional
from anomem.data.task import Task, assemble, class_index, generator, outlier_count
from anomem.validation import require, require_choice, require_count

TEXTURES = ("brick", "grass", "gravel")
# What scikit-image's wheel holds beside them, so nothing is fetched.
PHOTOGRAPHS = ("camera", "coins", "moon", "page", "text", "clock", "astronaut", "coffee", "chelsea", "rocket")
ANOMALIES = ("photographs", "defects", *DEFECTS)
PATCH = 64


def photograph(name: str) -> Tensor:
    """One bundled photograph in grey: [H, W] uint8."""
    with optional("the data set textures"):
        from skimage import data

    pixels = torch.from_numpy(getattr(data, name)())
    if pixels.dim() == 3:
        grey = pixels[..., :3].float() @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601 luma
        pixels = grey.round().to(torch.uint8)
    return pixels


def patches(picture: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Patches at uniformly drawn places.

    Args:
        picture: [H, W] uint8, both sides ≥ 64.
        count: how many.
        source: of the places.

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
    fits = PATCH <= strip <= len(turned) - PATCH
    require(
        fits,
        "test_fraction",
        lambda: f"from {PATCH / len(turned):.3g} to {1 - PATCH / len(turned):.3g}, so that patches of {PATCH} fit",
        test_fraction,
    )
    return torch.rot90(turned[strip:], -turns), torch.rot90(turned[:strip], -turns)


def textures(config: DataConfig) -> Task:
    """One texture as the normal class; see `DataConfig.anomalies` for what is anomalous.

    Labelled anomalies for training, if asked for, come from the halves of the photographs that are not tested on, or
    are defects on training patches.
    """
    require_choice(config.anomalies, "anomalies", ANOMALIES)
    require_count(config.train_patches, "train_patches", 2)
    require_count(config.test_patches, "test_patches", 1)
    normal = TEXTURES[class_index(config.normal, TEXTURES)]
    source = generator(config.seed)
    train_part, test_part = split_picture(photograph(normal), config.test_fraction, source)
    train = patches(train_part, config.train_patches, source)
    test = patches(test_part, config.test_patches, source)
    labelled = outlier_count(len(train), config.outlier_ratio, len(train))
    masks: Tensor | None = None
    if config.anomalies == "photographs":
        odd, kinds = _other_pictures(normal, config.test_patches, source, "test")
        outliers, _ = _other_pictures(normal, labelled, source, "train")
    else:
        names = DEFECTS if config.anomalies == "defects" else (config.anomalies,)
        odd, marks, kinds = _damaged(patches(test_part, config.test_patches, source), names, source)
        outliers, _, _ = _damaged(patches(train_part, labelled, source), names, source)
        masks = resize_masks(torch.cat([torch.zeros_like(marks), marks]), config.image_size)
    is_anomaly = torch.arange(len(test) + len(odd)) >= len(test)
    return assemble(
        f"textures {normal}",
        normal,
        ResidentImages(resize(torch.cat([train, outliers]), config.image_size)),
        torch.arange(len(train) + len(outliers)) < len(train),
        ResidentImages(resize(torch.cat([test, odd]), config.image_size)),
        [normal] * len(test) + kinds,
        is_anomaly,
        aligned=bool(config.aligned),
        test_masks=masks,
    )


def _other_pictures(normal: str, count: int, source: torch.Generator, part: str) -> tuple[Tensor, list[str]]:
    """Patches of the other textures and of the photographs, in turn; training and testing see different halves."""
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
