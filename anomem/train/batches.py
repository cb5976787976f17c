"""What both stages' steps share: the order of the batches, the optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from anomem.data import Images, ResidentImages
from anomem.train.config import OptimizerConfig
from anomem.train.network import is_shard
from anomem.train.rows import ORDER, seed_of

CHUNK = 1 << 20
"""Indices given to the image set at once; a streamed set starts its workers once per chunk."""


class Chosen:
    """Images of a resident set that are gathered when they are read: a batch need not lie in memory as a whole.

    Args:
        images: the set.
        indices: [m], which of them.
    """

    def __init__(self, images: ResidentImages, indices: Tensor) -> None:
        self.images, self.indices = images.images, indices

    def __getitem__(self, places: slice) -> Tensor:
        """Those at some places, [n, C, H, W] uint8."""
        return self.images.index_select(0, self.indices[places])


class Batch(NamedTuple):
    """The images that this process needs of a batch."""

    step: int
    """0 … steps − 1."""
    images: Tensor | Chosen
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
    images: Images,
    batch_size: int,
    seed: int,
    start: int,
    steps: int,
    places: Sequence[int] | None = None,
    at_once: bool = True,
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
        at_once: whether they are read together; those of a resident set are else gathered part by part.

    Yields:
        The step's images, on the device of the set.
    """
    needed = torch.arange(batch_size) if places is None else torch.tensor(list(places))
    place_of = {place: here for here, place in enumerate(needed.tolist())}
    source = _batches(images, batch_size, seed, start, steps, needed, at_once)
    while True:
        with record_function("anomem.batch"):
            batch = next(source, None)
        if batch is None:
            return
        yield Batch(*batch, place_of)


def _batches(
    images: Images, size: int, seed: int, start: int, steps: int, needed: Tensor, at_once: bool
) -> Iterator[tuple[int, Tensor | Chosen, Tensor]]:
    per_epoch = len(images) // size
    epochs_per_chunk = max(1, CHUNK // (per_epoch * size))
    step = start
    while step < steps:
        epoch, offset = divmod(step, per_epoch)
        epochs = range(epoch, epoch + min(-(-(offset + steps - step) // per_epoch), epochs_per_chunk))
        orders = [_permutation(len(images), seed, e)[: per_epoch * size] for e in epochs]
        order = torch.cat(orders)[offset * size :][: (steps - step) * size]
        chosen = order.view(-1, size)[:, needed]
        if isinstance(images, ResidentImages) and not at_once:
            for index in chosen.to(images.images.device, non_blocking=True):
                yield step, Chosen(images, index), index
                step += 1
            continue
        for batch, index in images.batches(chosen.flatten(), len(needed)):
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
    parameters: list[Tensor] = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    # One pass over the weights instead of five; not for shards.
    fused = all(p.device.type in ("cpu", "cuda") and not is_shard(p) for p in parameters)
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        fused=fused,
        foreach=False if not fused else None,
    )
    rate = _rate(config.learning_rate, parameters)
    for one in optimizer.param_groups:  # not above: the constructor would read a tensor on the host
        one["lr"] = rate
    return optimizer


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


def _rate(value: float, parameters: Sequence[Tensor]) -> float | Tensor:
    """A number that changes with the step: on GPUs a 0-dim tensor, because a CUDA graph keeps numbers as they are."""
    on_gpu = bool(parameters) and all(p.is_cuda and not is_shard(p) for p in parameters)
    return torch.tensor(value, device=parameters[0].device) if on_gpu else value


def set_rates(optimizer: torch.optim.SGD, average: Average, config: OptimizerConfig, step: int) -> None:
    """Set what depends on the step: the learning rate, and the decay of the average. Never waits for the device.

    Args:
        optimizer: of the stage.
        average: of its parameters.
        config: the one that the optimiser was built from.
        step: 0 … steps − 1.
    """
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
    average.begin(step)


def apply_gradients(optimizer: torch.optim.SGD, config: OptimizerConfig) -> None:
    """Clip if configured, update, and drop the gradients.

    Args:
        optimizer: with gradients in place.
        config: the one it was built from.
    """
    if config.clip is not None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Whole norms: of shards and of replicated gradients alike.
        norms = [torch.linalg.vector_norm(g.float()) for g in gradients]
        norms = [n.full_tensor() if is_shard(n) else n for n in norms]
        shrink = (config.clip / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp_max(1)
        for gradient in gradients:
            gradient.mul_(shrink)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Average:
    """A running average of parameters, which decays faster in the first steps; it replaces them in the end.

    Args:
        parameters: names and parameters.
        decay: of the average; None keeps no average.

    Example:
        >>> average = Average(list(model.named_parameters()), decay=0.99)
        >>> average.begin(step=0)
        >>> average.update()  # after every step
        >>> average.finish()  # the parameters are their averages now
    """

    def __init__(self, parameters: Sequence[tuple[str, Tensor]], decay: float | None) -> None:
        self.decay = decay
        self.pairs = [] if decay is None else [(name, p, p.detach().clone()) for name, p in parameters]
        self.weight = _rate(1.0, [mean for _, _, mean in self.pairs])
        """Of the new parameters in the average."""

    def begin(self, step: int) -> None:
        """Set the weight of a step (from 0)."""
        weight = 1 - min(self.decay or 0.0, (1 + step) / (10 + step))
        self.weight = self.weight.fill_(weight) if isinstance(self.weight, Tensor) else weight

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        for _, parameter, mean in self.pairs:
            mean.lerp_(parameter, self.weight)

    @torch.no_grad()
    def finish(self) -> None:
        """Set the parameters to their averages."""
        for _, parameter, mean in self.pairs:
            parameter.copy_(mean)
