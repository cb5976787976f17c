"""Checkpoints: tensors in a safetensors file, plain values in the JSON file that names it.

The JSON file is replaced last and atomically. A run killed at any moment leaves the old checkpoint or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from anomem.errors import UserError
from anomem.files import write_atomically, writing
from anomem.train.rundir import RunDirectory
from anomem.validation import shape_of

FORMAT = 1


class Checkpoint(NamedTuple):
    """The content of a checkpoint."""

    step: int
    """Gradient steps done."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    about: dict[str, Any]
    """Plain values."""


def save_checkpoint(
    directory: Path, name: str, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint, then delete the one it replaces.

    Args:
        directory: made if missing.
        name: of the checkpoint, "stage1".
        step: gradient steps done.
        tensors: to save.
        about: plain values to save.

    Raises:
        UserError: it cannot be written; the previous one is kept.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    file = f"{name}-{step:08d}.safetensors"
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    write_atomically(directory / file, content)
    note = {"format": FORMAT, "step": step, "tensors": file, "about": dict(about or {})}
    write_atomically(directory / f"{name}.json", json.dumps(note, indent=2).encode())
    # The second pattern: temporary files of a process that was killed while it wrote.
    for old in (*directory.glob(f"{name}-*.safetensors"), *directory.glob(f".{name}-*.safetensors.*")):
        if old.name != file:
            old.unlink()


def load_checkpoint(directory: Path, name: str) -> Checkpoint | None:
    """A checkpoint, or None where there is none.

    Args:
        directory: of the checkpoints.
        name: of the checkpoint.

    Raises:
        UserError: the checkpoint is there but damaged.
    """
    note_file = directory / f"{name}.json"
    if not note_file.exists():
        return None
    try:
        note: dict[str, Any] = json.loads(note_file.read_text(encoding="utf-8"))
        step, file, version = int(note["step"]), directory / str(note["tensors"]), int(note["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {note_file} is damaged ({error}); delete it to start this stage anew"
        ) from error
    if version != FORMAT:
        raise UserError(f"the checkpoint {note_file} has format {version}, expected {FORMAT}; train the run anew")
    try:
        return Checkpoint(step, load_file(file), dict(note.get("about", {})))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the checkpoint {file} is truncated or damaged ({error}); delete {note_file} to start this stage anew"
        ) from error


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, source: Path) -> None:
    """Copy a checkpoint's tensors into a module of the same shape.

    Args:
        module: to fill.
        tensors: of a checkpoint.
        prefix: of this module's names, "model.".
        source: the checkpoint, for messages.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape.
    """
    current = module.state_dict()
    saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for key in sorted(current.keys() ^ saved.keys()):
        has = "has no" if key in current else "has an unexpected"
        raise UserError(f"the checkpoint {source} {has} tensor `{prefix}{key}`: it belongs to another model")
    for key, value in current.items():
        if value.shape != saved[key].shape:
            raise UserError(
                f"the checkpoint {source} is of another shape: `{prefix}{key}` expected {shape_of(value)}, "
                f"received {shape_of(saved[key])}; use the configuration it was trained with"
            )
    module.load_state_dict(saved)


class StageState:
    """Modules, optimiser and generator of a stage, saved to and restored from its checkpoint.

    Args:
        name: of the stage.
        modules: the trained ones, by name.
        optimizer: of their parameters.
        generator: the stage's only source of randomness besides the order of the images.
        run: its checkpoints are used; None writes no checkpoint.
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
        """Load the checkpoint if there is one; returns the number of steps done.

        Raises:
            UserError: the checkpoint is damaged, or of another model.
        """
        checkpoint = None if self.directory is None else load_checkpoint(self.directory, self.name)
        if checkpoint is None or self.directory is None:
            return 0
        source = self.directory / f"{self.name}.json"
        for name, module in self.modules.items():
            load_module(module, checkpoint.tensors, f"{name}.", source)
        for name, parameter in self._parameters():
            momentum = checkpoint.tensors.get(f"momentum.{name}")
            if momentum is not None:
                # In the layout of the parameter (channels-last), as before the checkpoint was written.
                buffer = torch.empty_like(parameter.detach()).copy_(momentum)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.generator.set_state(checkpoint.tensors["generator"])
        return checkpoint.step

    def due(self, done: int, steps: int, every: int) -> bool:
        """Whether the checkpoint is due: every `every` steps (0: never) and after the last one.

        Args:
            done: steps done.
            steps: steps of the stage.
            every: steps between checkpoints.
        """
        return self.directory is not None and (done == steps or (every > 0 and done % every == 0))

    def save(self, done: int) -> None:
        """Write everything that the stage needs to resume with identical bits.

        Args:
            done: steps done.
        """
        if self.directory is None:
            return
        tensors = {
            f"{name}.{key}": x for name, module in self.modules.items() for key, x in module.state_dict().items()
        }
        for name, parameter in self._parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        save_checkpoint(self.directory, self.name, done, {**tensors, "generator": self.generator.get_state()})

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names in the checkpoint, and parameters."""
        return [(f"{name}.{key}", p) for name, module in self.modules.items() for key, p in module.named_parameters()]
