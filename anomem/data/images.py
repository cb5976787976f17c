"""Sets of images behind one interface: resident on the device, or read from a data set batch by batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomem.errors import UserError
from anomem.validation import require, require_count, require_index, shape_of

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass
class ImageSet:
    """Labelled images in memory, before they are split into a task.

    Attributes:
        images: [N, C, H, W] uint8 on the CPU.
        labels: [N] int64, indices into `classes`.
        classes: names of the classes.
        rows: [N] int64, which images of the data set these are; None for all in their order.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    rows: Tensor | None = None


class Images(Protocol):
    """A set of N images of one shape, read by index in batches."""

    @property
    def channels(self) -> int:
        """C."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def batches(self, order: Tensor, batch_size: int) -> Batches:
        """Batches of images in a given order.

        Args:
            order: [n] int64, which images, in which order; repeats are allowed.
            batch_size: b; the last batch may be smaller.

        Yields:
            The images [b, C, H, W] uint8 and their part of the order [b], both on the device of the set.
        """
        ...

    def to(self, device: torch.device | str) -> Images:
        """The same images, delivered on another device."""
        ...


class ResidentImages:
    """Images kept on the device as uint8 and gathered there by index.

    Args:
        images: [N, C, H, W] uint8.

    Example:
        >>> images = ResidentImages(pixels).to("cuda")  # pixels: [N, C, H, W] uint8
        >>> batch, index = next(images.batches(torch.randperm(len(images)), batch_size=64))
        >>> batch  # [64, C, H, W] uint8 on the GPU, images[index]
    """

    def __init__(self, images: Tensor) -> None:
        require(images.dim() == 4, "images", "a tensor [N, C, H, W]", images)
        require(images.dtype == torch.uint8, "images", "uint8", images.dtype)
        self.images = images

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, order: Tensor, batch_size: int) -> Batches:
        """See `Images.batches`; never waits for the device."""
        _check(order, batch_size, len(self))
        for part in order.to(self.images.device, non_blocking=True).split(batch_size):
            yield self.images.index_select(0, part), part

    def to(self, device: torch.device | str) -> ResidentImages:
        """A copy on another device; the same tensor if it is there already."""
        return ResidentImages(self.images.to(device))


class StreamedImages:
    """Images read from a torch data set by a DataLoader, for sets that do not fit on the device.

    Each call of `batches` starts its own workers: give it an order of several epochs to start them once.

    Args:
        dataset: item i is an image [C, H, W] uint8, all of one shape.
        workers: processes that read; 0 reads in the calling process.
        device: where the batches are delivered.

    Example:
        >>> images = StreamedImages(ImageFiles(paths, size=128), workers=4, device="cuda")
        >>> batch, index = next(images.batches(torch.arange(len(images)), batch_size=64))
        >>> batch  # [64, 3, 128, 128] uint8 on the GPU
    """

    def __init__(self, dataset: Dataset[Tensor], workers: int = 2, device: torch.device | str = "cpu") -> None:
        require(len(cast(Any, dataset)) > 0, "dataset", "at least one image", "none")
        require_count(workers, "workers", 0)
        self.dataset = dataset
        self.workers = workers
        self.device = torch.device(device)
        self._shape: torch.Size = dataset[0].shape

    @property
    def channels(self) -> int:
        """C."""
        return self._shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self._shape[1], self._shape[2]

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))

    def batches(self, order: Tensor, batch_size: int) -> Batches:
        """See `Images.batches`; copies to a GPU are asynchronous, from pinned memory."""
        _check(order, batch_size, len(self))
        parts = order.to(self.device).split(batch_size)  # one copy: those of single batches would not be pinned
        pinned = self.device.type == "cuda"
        # One item of the loader is one batch, and the loader keeps the order.
        loader: DataLoader[Tensor | UserError] = DataLoader(
            _Stacks(self.dataset),
            sampler=[part.tolist() for part in order.cpu().split(batch_size)],
            batch_size=None,
            num_workers=self.workers,
            pin_memory=pinned,
            worker_init_fn=_outlive_a_signal,
        )
        for images, part in zip(loader, parts, strict=True):
            if isinstance(images, UserError):
                raise images
            yield images.to(self.device, non_blocking=pinned), part

    def to(self, device: torch.device | str) -> StreamedImages:
        """The same data set, delivered on another device."""
        return StreamedImages(self.dataset, self.workers, device)


def _outlive_a_signal(_: int) -> None:
    """In a worker: a signal to all processes of a job is the main one's to act on, which needs images to end its step.

    The main process ends its workers with SIGTERM where they do not end by themselves: the second one is obeyed.
    """
    received = []

    def on_sigterm(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)

    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)


class _Stacks(Dataset[Any]):
    """Batches of a data set by lists of indices. Returns a `UserError`: raised in a worker it becomes a traceback."""

    def __init__(self, dataset: Dataset[Tensor]) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Tensor | UserError:
        try:
            return stack(self.dataset, indices)
        except UserError as error:
            return error


def stack(dataset: Dataset[Tensor], indices: Sequence[int]) -> Tensor:
    """Images [n, C, H, W] of a data set.

    Raises:
        ArgumentError: images of different shapes.
    """
    images = [dataset[i] for i in indices]
    for i, image in zip(indices, images, strict=True):
        require(
            image.shape == images[0].shape,
            "dataset",
            lambda: f"images of one shape, {shape_of(images[0])} as image {indices[0]}",
            lambda image=image, i=i: f"{shape_of(image)} for image {i}",
            "set `image_size`",
        )
    return torch.stack(images)


class Picked(Dataset[Tensor]):
    """Some images of a data set, in a given order.

    Args:
        dataset: item i is an image.
        indices: which items.
    """

    def __init__(self, dataset: Dataset[Tensor], indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.dataset[self.indices[index]]


def resident_or_streamed(dataset: Dataset[Tensor], resident_megabytes: float, workers: int) -> Images:
    """Read a data set into memory if it is small enough, else stream it.

    Args:
        dataset: at least one item; item i is an image [C, H, W] uint8, all of one shape.
        resident_megabytes: the limit.
        workers: for `StreamedImages`.
    """
    count = len(cast(Any, dataset))
    require(count > 0, "dataset", "at least one image", "none")
    if count * dataset[0].numel() > resident_megabytes * 2**20:
        return StreamedImages(dataset, workers)
    return ResidentImages(stack(dataset, range(count)))


class Statistics(NamedTuple):
    """Of the channels of a set, in [0, 1] units."""

    mean: tuple[float, ...]
    """C means."""
    std: tuple[float, ...]
    """C standard deviations; a constant channel gets 1, so that dividing by it is safe."""
    spread: float
    """Width of the interval that holds all but the darkest and the brightest thousandth of the values."""


def channel_statistics(images: Images, count: int, at_most: int = 2048) -> Statistics:
    """Mean, standard deviation and spread of the channels.

    Args:
        images: the set.
        count: only the first so many are measured; at least one.
        at_most: measure no more than this, evenly spaced.
    """
    order = torch.linspace(0, count - 1, min(count, at_most)).round().long()
    first = torch.zeros(images.channels, dtype=torch.float64)
    second, seen = torch.zeros_like(first), 0
    histogram = torch.zeros(256, dtype=torch.int64)
    for batch, _ in images.batches(order, 256):
        host = batch.cpu()
        pixels = host.double().div(255)
        first += pixels.sum((0, 2, 3))
        second += pixels.square().sum((0, 2, 3))
        seen += pixels[:, 0].numel()
        histogram += torch.bincount(host.flatten().int(), minlength=256)
    mean = first / seen
    std = (second / seen - mean.square()).clamp_min(0).sqrt()
    below = histogram.cumsum(0) / histogram.sum()
    spread = int((below < 0.999).sum() - (below < 0.001).sum()) / 255
    return Statistics(tuple(mean.tolist()), tuple(torch.where(std > 1e-6, std, 1.0).tolist()), spread)


def _check(order: Tensor, batch_size: int, count: int) -> None:
    require_index(order, "order", "[n]", (1,), count, "images")
    require_count(batch_size, "batch_size", 1)
