"""Checkpoints: tensors in a safetensors file, everything else in the JSON file that names it.

The JSON file is replaced last and in one step, so whatever it names is complete: a run killed at any moment leaves
either the old checkpoint or the new one.
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
from anomem.validation import shape_of

FORMAT = 1


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    step: int
    """Gradient steps done."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    about: dict[str, Any]
    """Plain values kept beside them."""


def save_checkpoint(
    directory: Path, name: str, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint, then drop the one it replaces.

    Args:
        directory: made if missing.
        name: of the checkpoint, "stage1".
        step: gradient steps done.
        tensors: what to keep.
        about: plain values to keep beside them.

    Raises:
        UserError: it cannot be written; the one before it is still there.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    file = f"{name}-{step:08d}.safetensors"
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    write_atomically(directory / file, content)
    note = {"format": FORMAT, "step": step, "tensors": file, "about": dict(about or {})}
    write_atomically(directory / f"{name}.json", json.dumps(note, indent=2).encode())
    # Also what a process that was killed while it wrote has left beside them.
    for old in (*directory.glob(f"{name}-*.safetensors"), *directory.glob(f".{name}-*.safetensors.*")):
        if old.name != file:
            old.unlink()


def load_checkpoint(directory: Path, name: str) -> Checkpoint | None:
    """A checkpoint, or None where there is none.

    Args:
        directory: where checkpoints lie.
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
        module: what to fill.
        tensors: a checkpoint's.
        prefix: of this module's names among them, "model.".
        source: the checkpoint, for messages.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape.
    """
    mine = module.state_dict()
    theirs = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for key in sorted(mine.keys() ^ theirs.keys()):
        has = "has no" if key in mine else "has an unexpected"
        raise UserError(f"the checkpoint {source} {has} tensor `{prefix}{key}`: it belongs to another model")
    for key, value in mine.items():
        if value.shape != theirs[key].shape:
            raise UserError(
                f"the checkpoint {source} is of another shape: `{prefix}{key}` expected {shape_of(value)}, "
                f"received {shape_of(theirs[key])}; use the configuration it was trained with"
            )
    module.load_state_dict(theirs)


def training_tensors(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Everything a stage needs to go on as if it had never stopped.

    Args:
        modules: name -> module; their tensors are kept as "name.tensor".
        optimizer: its momentum is kept as "momentum.name.parameter".
        generator: its state is kept as "generator".
    """
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for name, parameter in _named_parameters(modules):
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    return {**tensors, "generator": generator.get_state()}


def load_training(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    source: Path,
) -> None:
    """Undo `training_tensors`; arguments as there.

    Raises:
        UserError: the tensors are those of another model.
    """
    for name, module in modules.items():
        load_module(module, tensors, f"{name}.", source)
    for name, parameter in _named_parameters(modules):
        momentum = tensors.get(f"momentum.{name}")
        if momentum is not None:
            # The layout is the parameter's own (channels-last), as it was before the checkpoint was written.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(momentum)
    generator.set_state(tensors["generator"])


def _named_parameters(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{name}.{key}", p) for name, module in modules.items() for key, p in module.named_parameters()]
