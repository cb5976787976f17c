"""What both stages' steps share: the order of the batches, the optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from anomem.data import Images
from anomem.train.config import OptimizerConfig
from anomem.train.rows import ORDER, seed_of

CHUNK = 1 << 20
"""Indices given to the image set at once; a streamed set starts its workers once per chunk."""


class Batch(NamedTuple):
    """The images that this process needs of a batch."""

    step: int
    """0 … steps − 1."""
    images: Tensor
    """[m, C, H, W] uint8 on the device of the set."""
    indices: Tensor
    """[m], which training images these are."""
    place_of: Mapping[int, int]
    """Place in the whole batch -> place here."""

    def at(self, places: range) -> Tensor:
        """The images at consecutive places of the whole batch, which are consecutive here."""
        return self.images[self._slice(places)]

    def indices_at(self, places: range) -> Tensor:
        """Which training images are at consecutive places of the whole batch."""
        return self.indices[self._slice(places)]

    def runs(self, places: Sequence[int]) -> list[Tensor]:
        """The images at any places, as slices: an index would have to be sent to the device."""
        found: list[list[int]] = []
        for place in places:
            here = self.place_of[place]
            if found and found[-1][1] == here:
                found[-1][1] += 1
            else:
                found.append([here, here + 1])
        return [self.images[start:stop] for start, stop in found]

    def _slice(self, places: range) -> slice:
        first = self.place_of[places.start] if len(places) else 0
        return slice(first, first + len(places))


def training_batches(
    images: Images, batch_size: int, seed: int, start: int, steps: int, places: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches of equal size, every image at most once per epoch, a fresh permutation each epoch.

    The order is a function of the seed alone, so that a run can be resumed at any step, by any number of processes.
    Waiting for a batch is the profiler's range "anomem.batch".

    Args:
        images: N ≥ 2 images.
        batch_size: b ≤ N. An incomplete batch at the end of an epoch is dropped.
        seed: of the permutations.
        start: first step to give.
        steps: one past the last.
        places: which images of a batch are needed here; all when None.

    Yields:
        The step's images, on the device of the set.
    """
    needed = torch.arange(batch_size) if places is None else torch.tensor(list(places))
    place_of = {place: here for here, place in enumerate(needed.tolist())}
    source = _batches(images, batch_size, seed, start, steps, needed)
    while True:
        with record_function("anomem.batch"):
            batch = next(source, None)
        if batch is None:
            return
        yield Batch(*batch, place_of)


def _batches(
    images: Images, size: int, seed: int, start: int, steps: int, needed: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    per_epoch = len(images) // size
    epochs_per_chunk = max(1, CHUNK // (per_epoch * size))
    step = start
    while step < steps:
        epoch, offset = divmod(step, per_epoch)
        epochs = range(epoch, epoch + min(-(-(offset + steps - step) // per_epoch), epochs_per_chunk))
        orders = [_permutation(len(images), seed, e)[: per_epoch * size] for e in epochs]
        order = torch.cat(orders)[offset * size :][: (steps - step) * size]
        for batch, index in images.batches(order.view(-1, size)[:, needed].flatten(), len(needed)):
            yield step, batch, index
            step += 1


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(ORDER, seed, epoch)))


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
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    # One pass over the weights instead of five; not for shards.
    fused = all(p.device.type in ("cpu", "cuda") and not isinstance(p, DTensor) for p in parameters)
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        fused=fused,
        foreach=False if not fused else None,
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
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Whole norms: of shards and of replicated gradients alike.
        norms = [torch.linalg.vector_norm(g.float()) for g in gradients]
        norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
        shrink = (config.clip / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp_max(1)
        for gradient in gradients:
            gradient.mul_(shrink)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Average:
    """A running average of parameters, which decays faster in the first steps; it replaces them in the end.

    Args:
        parameters: names and parameters.
        decay: of the average; None keeps no average.

    Example:
        >>> average = Average(list(model.named_parameters()), decay=0.99)
        >>> average.update(step=0)  # after every step
        >>> average.finish()  # the parameters are their averages now
    """

    def __init__(self, parameters: Sequence[tuple[str, Tensor]], decay: float | None) -> None:
        self.decay = decay
        self.pairs = [] if decay is None else [(name, p, p.detach().clone()) for name, p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after a step (from 0)."""
        for _, parameter, mean in self.pairs:
            mean.lerp_(parameter, 1 - min(self.decay or 0.0, (1 + step) / (10 + step)))

    @torch.no_grad()
    def finish(self) -> None:
        """Set the parameters to their averages."""
        for _, parameter, mean in self.pairs:
            parameter.copy_(mean)
