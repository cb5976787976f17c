"""SGD with Nesterov momentum, weight decay off the memories, warm-up then cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from anomem.train.config import OptimizerConfig
from anomem.validation import require, require_count, require_number, require_positive_number


def check_optimizer(config: OptimizerConfig, name: str = "optimizer") -> None:
    """Raise `ArgumentError` for numbers no run can use.

    Args:
        config: what to check.
        name: how the user spells it.
    """
    require_count(config.steps, f"{name}.steps", 1)
    require_count(config.warmup, f"{name}.warmup", 0)
    require_positive_number(config.learning_rate, f"{name}.learning_rate")
    require_number(config.weight_decay, f"{name}.weight_decay")
    require(config.weight_decay >= 0, f"{name}.weight_decay", "a number ≥ 0", config.weight_decay)
    if config.clip is not None:
        require_positive_number(config.clip, f"{name}.clip")
    require(0 < config.momentum < 1, f"{name}.momentum", "a number in (0, 1)", config.momentum)
    require(
        isinstance(config.batch_size, int) and config.batch_size >= 2,
        f"{name}.batch_size",
        "an integer ≥ 2",
        config.batch_size,
        "the contrast needs another image",
    )


def build_optimizer(
    config: OptimizerConfig, decayed: Iterable[nn.Parameter], undecayed: Iterable[nn.Parameter] = ()
) -> torch.optim.SGD:
    """The optimiser of a stage.

    Args:
        config: rate, momentum and decay.
        decayed: parameters under weight decay.
        undecayed: parameters without (the memories: decay would pull prototypes to the origin, where all are alike).
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
    """Clip if asked, set the rate of this step, update, and drop the gradients.

    Args:
        optimizer: with gradients in place.
        config: the same it was built from.
        step: 0 … steps − 1.
    """
    if config.clip is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
