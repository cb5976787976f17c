"""Where the views of a step come from.

`Batched` is this library's way: images stay on the device as uint8 and are augmented there as a batch. `PerImage` is
the pipeline that is usually written: a `DataLoader` whose worker processes augment image by image with torchvision.
Both make the same kinds of changes with the same ranges; their random numbers differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomem.augment import Augmentation, AugmentConfig
from benchmarks.training.phases import Phases


def random_images(count: int, side: int) -> Tensor:
    """[count, 3, side, side] uint8: what is in a picture does not change how long a step takes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


class Batched:
    """Batches of two views by `anomem.augment`.

    Args:
        images: [N, C, H, W] uint8.
        batch: B.
        device: "cpu" or "cuda".
    """

    def __init__(self, images: Tensor, batch: int, device: str) -> None:
        self.images = images.to(device)
        self.batch = batch
        self.augmentation = Augmentation(AugmentConfig())
        self.generator = torch.Generator(device).manual_seed(0)

    def views(self, phases: Phases) -> Iterator[Tensor]:
        """[2B, C, H, W] in [0, 1], without end."""
        while True:
            with phases("data"):
                index = torch.randint(
                    len(self.images), (self.batch,), generator=self.generator, device=self.images.device
                )
                batch = self.images[index]
            with phases("augmentation"):
                views = torch.cat([self.augmentation(batch, self.generator) for _ in range(2)])
            yield views


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """An image as two views by torchvision's transforms.

    Args:
        images: [N, C, H, W] uint8.
    """

    def __init__(self, images: Tensor) -> None:
        from torchvision.transforms import v2

        config = AugmentConfig()
        side = images.shape[-1]
        radius = min(max(1, round(3 * config.blur_sigma[1])), side - 1)
        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(side, scale=config.crop_area, ratio=config.crop_ratio, antialias=True),
                v2.RandomHorizontalFlip(config.flip),
                v2.RandomApply([v2.ColorJitter(config.brightness, config.contrast, config.saturation)], config.jitter),
                v2.ToDtype(torch.float32, scale=True),
                v2.RandomApply([v2.GaussianBlur(2 * radius + 1, config.blur_sigma)], config.blur),
                v2.Lambda(lambda x: (x + config.noise * torch.rand(()) * torch.randn_like(x)).clamp(0, 1)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return self.transform(image), self.transform(image)


class PerImage:
    """Batches of two views by worker processes.

    Args:
        images: [N, C, H, W] uint8.
        batch: B.
        device: "cpu" or "cuda".
        workers: processes; 0 augments in the training process.
    """

    def __init__(self, images: Tensor, batch: int, device: str, workers: int) -> None:
        self.device = device
        self.loader = DataLoader(
            TwoViews(images),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device == "cuda",
        )

    def views(self, phases: Phases) -> Iterator[Tensor]:
        """[2B, C, H, W] in [0, 1], without end; what is waited for in `data` includes the workers' augmentation."""
        while True:
            batches = iter(self.loader)
            while True:
                with phases("data"):
                    pair = next(batches, None)
                    if pair is None:
                        break
                    views = torch.cat(pair).to(self.device, non_blocking=True)
                yield views
