"""Augmented views of a batch, with what is known about each image."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem.augment import Augmentation, synthesize_outliers
from anomem.train.config import TrainConfig
from anomem.validation import require


class Views:
    """Makes the views of both stages: adds synthetic outliers if asked, then augments.

    Args:
        config: augmentations, ratio of synthetic outliers, layout.
        is_normal: [N] bool of the training images, on their device; None when all are normal.
        generator: source of randomness, on the device of the images.
    """

    def __init__(self, config: TrainConfig, is_normal: Tensor | None, generator: torch.Generator) -> None:
        ratio = config.synthetic_outliers
        require(ratio >= 0, "synthetic_outliers", "a ratio ≥ 0", ratio)
        self.augmentation = Augmentation(config.augment)
        self.is_normal = is_normal
        self.synthetic = ratio
        self.generator = generator
        self.layout = torch.channels_last if config.run.channels_last else torch.contiguous_format

    def __call__(self, images: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` views of every image, one after another: all images' first view, then all images' second.

        Args:
            images: [b, C, H, W] uint8.
            index: [b], which training images these are.
            count: number of views.

        Returns:
            [count · B, C, H, W] float in [0, 1], and is_normal [B] bool (None when all are); B = b plus the
            synthetic outliers, which stand last.
        """
        x = images.float() / 255
        normal = None if self.is_normal is None else self.is_normal[index]
        outliers = round(self.synthetic * len(x))
        if outliers:
            if normal is None:
                normal = torch.ones(len(x), dtype=torch.bool, device=x.device)
            # Which images are warped does not matter: the order of a batch is random already.
            source = x.repeat(-(-outliers // len(x)), 1, 1, 1)[:outliers]
            x = torch.cat([x, synthesize_outliers(source, self.generator)])
            normal = torch.cat([normal, normal.new_zeros(outliers)])
        views = torch.cat([self.augmentation(x, self.generator) for _ in range(count)])
        return views.contiguous(memory_format=self.layout), normal
