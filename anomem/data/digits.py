"""scikit-learn's bundled digits: 1797 grey images of 8×8 pixels, ten classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from anomem.data.config import DataConfig
from anomem.data.images import ImageSet
from anomem.data.optional import optional
from anomem.data.task import Task, one_against_all, stratified_split


def load_digits(size: int = 16) -> ImageSet:
    """All digits, upsampled bilinearly.

    Args:
        size: side of an image in pixels.

    Returns:
        Images [1797, 1, size, size] uint8.
    """
    with optional("the data set digits"):
        from sklearn.datasets import load_digits as bundled

    data = bundled()
    images = torch.from_numpy(data.images).float()[:, None] / 16  # ink from 0 to 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    pixels = (images * 255).round().to(torch.uint8)
    return ImageSet(pixels, torch.from_numpy(data.target).long(), tuple(str(digit) for digit in range(10)))


def digits(config: DataConfig) -> Task:
    """One digit against the nine others, each class split by `test_fraction` and seed."""
    everything = load_digits(16 if config.image_size is None else config.image_size)
    train, test = (
        ImageSet(everything.images[rows], everything.labels[rows], everything.classes)
        for rows in stratified_split(everything.labels, config.test_fraction, config.seed)
    )
    return one_against_all("digits", train, test, config, aligned=True)
