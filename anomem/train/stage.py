"""What both stages share: device settings, and the checkpoint a stage starts from and leaves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from anomem.errors import UserError
from anomem.train.checkpoint import load_checkpoint, load_training, save_checkpoint, training_tensors
from anomem.train.config import RunConfig
from anomem.train.rundir import RunDirectory


def device_of(config: RunConfig) -> torch.device:
    """The device a run uses.

    Raises:
        UserError: no such device here.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"`run.device`: expected a device of this machine, received {config.device!r}: {reason}"
        ) from error
    return device


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast if the run asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext()


class StageState:
    """A stage's modules, optimiser and generator, kept in its checkpoint.

    Args:
        name: of the stage.
        modules: what is trained.
        optimizer: over their parameters.
        generator: the stage's only source of randomness besides the order of the images.
        run: whose checkpoint it is; None keeps none.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        run: RunDirectory | None,
    ) -> None:
        self.name, self.modules, self.optimizer, self.generator = name, modules, optimizer, generator
        self.directory = None if run is None else run.checkpoints

    def restore(self) -> int:
        """Go on from the checkpoint if there is one; returns the number of steps done.

        Raises:
            UserError: the checkpoint is damaged, or of another model.
        """
        found = None if self.directory is None else load_checkpoint(self.directory, self.name)
        if found is None or self.directory is None:
            return 0
        load_training(found.tensors, self.modules, self.optimizer, self.generator, self.directory / f"{self.name}.json")
        return found.step

    def due(self, done: int, steps: int, every: int) -> bool:
        """Whether the checkpoint is due: every `every` steps (0: never) and after the last one.

        Args:
            done: steps done.
            steps: steps of the stage.
            every: steps between checkpoints.
        """
        return self.directory is not None and (done == steps or (every > 0 and done % every == 0))

    def save(self, done: int) -> None:
        """Write the checkpoint.

        Args:
            done: steps done.
        """
        if self.directory is not None:
            tensors = training_tensors(self.modules, self.optimizer, self.generator)
            save_checkpoint(self.directory, self.name, done, tensors)
