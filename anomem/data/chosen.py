"""Sets made of other sets: some of their images, or two of them one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anomem.data.images import Batches, Images
from anomem.validation import require


class ChosenImages:
    """Some images of a set, in a given order and as often as wanted.

    Args:
        images: N images.
        rows: [n] int64, which of them.

    Example:
        >>> twice = ChosenImages(images, torch.arange(len(images)).repeat(2))
        >>> batch, index = next(twice.batches(torch.arange(len(twice)), 64))  # [64, C, H, W], [64] below len(twice)
    """

    def __init__(self, images: Images, rows: Tensor) -> None:
        self.images, self.rows = images, rows.cpu()

    @property
    def dataset(self) -> Any:
        """The files behind a streamed set, by which a resumed run knows it; else None."""
        return getattr(self.images, "dataset", None)

    @property
    def channels(self) -> int:
        """C."""
        return self.images.channels

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.size

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, order: Tensor, batch_size: int) -> Batches:
        """See `Images.batches`."""
        order = order.cpu()
        parts = order.split(batch_size)
        for (batch, index), part in zip(self.images.batches(self.rows[order], batch_size), parts, strict=True):
            yield batch, part.to(index.device, non_blocking=True)

    def to(self, device: torch.device | str) -> ChosenImages:
        """The same images, delivered on another device."""
        return ChosenImages(self.images.to(device), self.rows)


class JoinedImages:
    """Two sets of images of one shape, one after the other; neither is held in memory for it.

    Args:
        first: N images.
        second: M images.

    Example:
        >>> images = JoinedImages(normals, defects)
        >>> batch, index = next(images.batches(torch.tensor([0, len(normals)]), 2))  # [1, C, H, W], the first normal
    """

    def __init__(self, first: Images, second: Images) -> None:
        one, other = (first.channels, *first.size), (second.channels, *second.size)
        require(one == other, "second", f"images of {one}, as the first", other)
        self.first, self.second = first, second

    @property
    def channels(self) -> int:
        """C."""
        return self.first.channels

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.first.size

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def batches(self, order: Tensor, batch_size: int) -> Batches:
        """See `Images.batches`; a batch is of one set, so that one may be smaller where the order changes over."""
        for in_second, run in _runs(order.cpu(), len(self.first)):
            images, before = (self.second, len(self.first)) if in_second else (self.first, 0)
            for batch, index in images.batches(run - before, batch_size):
                yield batch, index + before

    def to(self, device: torch.device | str) -> JoinedImages:
        """The same images, delivered on another device."""
        return JoinedImages(self.first.to(device), self.second.to(device))


def _runs(order: Tensor, border: int) -> Iterator[tuple[bool, Tensor]]:
    """The longest stretches of an order that stay on one side of a border."""
    if len(order):
        changes = (order >= border).diff().nonzero().flatten() + 1
        for run in order.tensor_split(changes):
            yield bool(run[0] >= border), run
