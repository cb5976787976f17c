"""The order in which a stage sees its images: a pure function of the seed, so that any step can be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from anomem.data import Images

CHUNK = 1 << 20
"""Indices handed to the image set at once; a streamed set starts its workers once per chunk."""


def training_batches(
    images: Images, batch_size: int, seed: int, start: int, steps: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches of equal size, every image at most once per epoch, a fresh permutation each epoch.

    Args:
        images: N ≥ 2 images.
        batch_size: b; N when N is smaller. What is left of an epoch is dropped.
        seed: of the permutations.
        start: first step to give.
        steps: one past the last.

    Yields:
        step, images [b, C, H, W] uint8 and their indices [b], on the device of the set.
    """
    source = _batches(images, min(batch_size, len(images)), seed, start, steps)
    while True:
        with record_function("anomem.batch"):
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _batches(images: Images, size: int, seed: int, start: int, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    per_epoch = len(images) // size
    epochs_per_chunk = max(1, CHUNK // (per_epoch * size))
    step = start
    while step < steps:
        epoch, offset = divmod(step, per_epoch)
        needed = -(-(offset + steps - step) // per_epoch)
        epochs = range(epoch, epoch + min(needed, epochs_per_chunk))
        orders = [_permutation(len(images), seed, e)[: per_epoch * size] for e in epochs]
        order = torch.cat(orders)[offset * size :][: (steps - step) * size]
        for batch, index in images.batches(order, size):
            yield step, batch, index
            step += 1


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    # Seeds of different (seed, epoch) must not meet: a run has fewer than 2³¹ epochs.
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed << 31) + epoch))
