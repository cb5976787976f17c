"""What both stages' steps share: the order of the batches, autocast, the optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from anomem.data import Images
from anomem.train.config import OptimizerConfig, RunConfig

CHUNK = 1 << 20
"""Indices given to the image set at once; a streamed set starts its workers once per chunk."""


def training_batches(
    images: Images, batch_size: int, seed: int, start: int, steps: int, anomalous: Tensor | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches of equal size, every image at most once per epoch, a fresh permutation each epoch.

    Balanced batches: half of each, rounded down, is drawn from the anomalies, which come again within an epoch as often
    as needed; an epoch is one pass over the normals.

    The order is a function of the seed alone, so that a run can be resumed at any step. Waiting for a batch is the
    profiler's range "anomem.batch".

    Args:
        images: N ≥ 2 images.
        batch_size: b; N when N is smaller. An incomplete batch at the end of an epoch is dropped.
        seed: of the permutations.
        start: first step to give.
        steps: one past the last.
        anomalous: [N] bool on the CPU, at least one of each kind, for balanced batches; None draws from all alike.

    Yields:
        step, images [b, C, H, W] uint8 and their indices [b], on the device of the set.
    """
    source = _batches(images, min(batch_size, len(images)), seed, start, steps, anomalous)
    while True:
        with record_function("anomem.batch"):
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _batches(
    images: Images, size: int, seed: int, start: int, steps: int, anomalous: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    per_epoch = len(images) // size
    if anomalous is not None:
        per_epoch = max(1, int((~anomalous).sum()) // (size - size // 2))
    epochs_per_chunk = max(1, CHUNK // (per_epoch * size))
    step = start
    while step < steps:
        epoch, offset = divmod(step, per_epoch)
        needed = -(-(offset + steps - step) // per_epoch)
        epochs = range(epoch, epoch + min(needed, epochs_per_chunk))
        orders = [_order(len(images), seed, e, per_epoch, size, anomalous) for e in epochs]
        order = torch.cat(orders)[offset * size :][: (steps - step) * size]
        for batch, index in images.batches(order, size):
            yield step, batch, index
            step += 1


def _order(count: int, seed: int, epoch: int, batches: int, size: int, anomalous: Tensor | None) -> Tensor:
    """The images of an epoch, batch after batch: [batches · size]."""
    # Distinct for every (seed, epoch): a run has fewer than 2³¹ epochs.
    source = torch.Generator().manual_seed((seed << 31) + epoch)
    permutation = torch.randperm(count, generator=source)
    if anomalous is None:
        return permutation[: batches * size]
    parts = []
    for rows, part in (
        (permutation[~anomalous[permutation]], size - size // 2),
        (permutation[anomalous[permutation]], size // 2),
    ):
        repeats = -(-batches * part // len(rows))
        parts.append(rows.repeat(repeats)[: batches * part].view(batches, part))
    return torch.cat(parts, dim=1).flatten()


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast if configured."""
    return torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext()


def build_optimizer(
    config: OptimizerConfig, decayed: Iterable[nn.Parameter], undecayed: Iterable[nn.Parameter] = ()
) -> torch.optim.SGD:
    """The optimiser of a stage.

    Args:
        config: rate, momentum and decay.
        decayed: parameters under weight decay.
        undecayed: parameters without: the memories, because decay would pull all prototypes to the origin.
    """
    groups = [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": list(undecayed), "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
    )


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Rate of a step (from 0): linear up to the peak over `warmup` steps, then a half cosine to zero.

    Args:
        config: peak, warm-up and number of steps.
        step: 0 … steps − 1.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def apply_gradients(optimizer: torch.optim.SGD, config: OptimizerConfig, step: int) -> None:
    """Clip if configured, set the rate of this step, update, and drop the gradients.

    Args:
        optimizer: with gradients in place.
        config: the one it was built from.
        step: 0 … steps − 1.
    """
    if config.clip is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
