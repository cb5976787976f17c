"""Checkpoints: tensors in a safetensors file, plain values in the JSON file that names it.

The JSON file is replaced last and atomically. A run killed at any moment leaves the old checkpoint or the new one. The
JSON file holds a digest of the tensors, and one of its own values.

The project writes its own because `torch.distributed.checkpoint` pickles its plan into `.metadata`: sharded tensors are
gathered, and the first process writes them whole, so that any number of processes can go on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from anomem import choice
from anomem.data import Images
from anomem.errors import UserError
from anomem.files import write_atomically, writing
from anomem.train.batches import Average
from anomem.train.config import FitConfig, TrainConfig, read_json, trained_settings
from anomem.train.monitor import Monitor
from anomem.train.network import Network, sharded_as, whole
from anomem.train.ranks import Ranks
from anomem.train.rundir import STAGES, RunDirectory
from anomem.train.stopping import Interrupted, Request
from anomem.validation import shape_of

FORMAT = 2


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
        UserError: a tensor is not finite, or it cannot be written; the previous one is kept.
    """
    bad = _not_finite(tensors)
    if bad is not None:
        if name == "detector":
            raise UserError(f"{name}: the values of `{bad}` are not finite; check the images and the encoder's weights")
        raise UserError(
            f"{name}: the values of `{bad}` are not finite after step {step}; "
            f"lower --{'stage2.' if name == 'stage2' else ''}optimizer.learning-rate, or check the images"
        )
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    file = _tensor_file(name, step)
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    write_atomically(directory / file, content)
    note = {
        "format": FORMAT,
        "step": step,
        "tensors": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "about": dict(about or {}),
    }
    note["digest"] = _digest(note)
    write_atomically(directory / f"{name}.json", json.dumps(note, indent=2, allow_nan=False).encode())
    # The second pattern: temporary files of a process that was killed while it wrote.
    for old in (*directory.glob(f"{name}-*.safetensors"), *directory.glob(f".{name}-*.safetensors.*")):
        if old.name != file:
            old.unlink(missing_ok=True)


def load_checkpoint(directory: Path, name: str) -> Checkpoint | None:
    """A checkpoint, or None where there is none.

    Args:
        directory: of the checkpoints.
        name: of the checkpoint.

    Raises:
        UserError: the checkpoint is there but damaged, changed since it was written, or not finite.
    """
    note_file = directory / f"{name}.json"
    note = _read_note(note_file)
    if note is None:
        return None
    file = directory / note["tensors"]
    anew = _remedy(note_file)
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != note["sha256"]:
            raise UserError(
                f"the checkpoint {file} is truncated or damaged (its digest is not the one it was written with); {anew}"
            )
        checkpoint = Checkpoint(note["step"], load(content), note["about"])
    except (SafetensorError, OSError) as error:
        raise UserError(f"the checkpoint {file} is truncated or damaged ({error}); {anew}") from error
    bad = _not_finite(checkpoint.tensors)
    if bad is not None:
        raise UserError(f"the checkpoint {file} is damaged (the values of `{bad}` are not finite); {anew}")
    return checkpoint


def saved_step(directory: Path, name: str) -> int | None:
    """Steps that a checkpoint has done, without a look at its tensors; None where there is none.

    Raises:
        UserError: its JSON file is damaged.
    """
    note = _read_note(directory / f"{name}.json")
    return None if note is None else int(note["step"])


def _read_note(note_file: Path) -> dict[str, Any] | None:
    """The JSON file of a checkpoint, checked; None where there is none."""
    if not note_file.exists():
        return None
    anew = _remedy(note_file)
    try:
        note = read_json(note_file)
        note = note if isinstance(note, dict) else {}
        digest = note.pop("digest", None)
        intact = digest == _digest(note)
    except (UserError, RecursionError) as error:
        raise UserError(f"the checkpoint {note_file} is damaged ({error}); {anew}") from error
    version, step, tensors = (note.get(name) for name in ("format", "step", "tensors"))
    if version != FORMAT and isinstance(version, int):
        raise UserError(f"the checkpoint {note_file} has format {version}, expected {FORMAT}; train the run anew")
    if isinstance(step, int) and tensors != _tensor_file(note_file.stem, step):
        raise UserError(f"the checkpoint {note_file} is damaged (its tensors are in {tensors}, not beside it); {anew}")
    if version != FORMAT or not intact:
        raise UserError(f"the checkpoint {note_file} is damaged (it was changed after it was written); {anew}")
    checked: dict[str, Any] = note
    return checked


def provenance(directory: Path, name: str, config: TrainConfig | FitConfig) -> dict[str, Any]:
    """What a checkpoint says about its origin, for `require_provenance`.

    Args:
        directory: of the checkpoints.
        name: of the checkpoint.
        config: of the run.

    Returns:
        "settings" it was trained with, and "after": the digests of the earlier stages' checkpoints.
    """
    return {"settings": trained_settings(config, name), "after": _digests_before(directory, name)}


def require_provenance(directory: Path, name: str, config: TrainConfig | FitConfig, about: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to this run and was trained with its settings.

    Args:
        directory: of the checkpoints.
        name: of the checkpoint.
        config: of the run, as its file says now.
        about: of the checkpoint.

    Raises:
        UserError: another run's checkpoint, or an edited setting, by name.
    """
    source, trained, current = directory / f"{name}.json", about.get("settings", {}), trained_settings(config, name)
    for setting in sorted(trained.keys() & current.keys()):
        if trained[setting] != current[setting]:
            raise UserError(
                f"the checkpoint {source} was trained with `{setting}` = {json.dumps(trained[setting])}, config.json "
                f"says {json.dumps(current[setting])}; set it back, or train a new run"
            )
    before, after = _digests_before(directory, name), about.get("after", {})
    for stage in sorted(before.keys() & after.keys()):
        if before[stage] != after[stage]:
            raise UserError(
                f"the checkpoint {source} belongs to another run: it continued another {stage}; "
                "delete it, then continue the run with `anomem train --resume`"
            )


def _digests_before(directory: Path, name: str) -> dict[str, str]:
    """Stage -> digest of its tensors, for the stages before this checkpoint."""
    notes = {stage: _read_note(directory / f"{stage}.json") for stage in STAGES if stage < name or name not in STAGES}
    return {stage: note["sha256"] for stage, note in notes.items() if note is not None}


def _remedy(note_file: Path) -> str:
    """What to do about a damaged checkpoint."""
    if note_file.stem in STAGES:
        return f"delete {note_file} to start this stage anew"
    if note_file.stem == "detector":
        return "fit anew, into another directory"
    return f"delete {note_file}, then continue the run with `anomem train --resume`"


def _tensor_file(name: str, step: int) -> str:
    return f"{name}-{step:08d}.safetensors"


def _digest(note: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor with NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return name
    return None


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, source: Path) -> None:
    """Copy a checkpoint's tensors into a module of the same shape.

    Args:
        module: to fill.
        tensors: of a checkpoint.
        prefix: of this module's names, "model.".
        source: the checkpoint, for messages.

    Raises:
        UserError: a tensor is missing, superfluous, of another shape or of another dtype.
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
        if value.dtype != saved[key].dtype:
            raise UserError(
                f"the checkpoint {source} is of another dtype: `{prefix}{key}` expected {value.dtype}, "
                f"received {saved[key].dtype}; train a new run"
            )
    module.load_state_dict(saved)


def identity(images: Images) -> dict[str, Any]:
    """What a resumed run compares the training images with: their number, and the names of streamed files.

    The mean and the standard deviation of their channels are compared too; they are tensors of the model.
    """
    paths = getattr(getattr(images, "dataset", None), "paths", None)
    names = None if paths is None else "\n".join("/".join(path.parts[-2:]) for path in paths)
    return {
        "count": len(images),
        "names": None if names is None else hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
    }


class StageState:
    """Modules, optimiser and generator of a stage, saved to and restored from its checkpoint.

    Args:
        name: of the stage.
        modules: the trained ones, by name.
        optimizer: of their parameters.
        images: the training images; a resumed run must have the same.
        config: of the run.
        run: its checkpoints are used; None writes no checkpoint.
        average: of the parameters.
        ranks: the processes. The first one writes complete tensors, so that any number of processes can go on.
        network: has the encoder as the processes share it; None where all of the modules are replicated.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        images: Images,
        config: TrainConfig,
        run: RunDirectory | None,
        average: Average,
        ranks: Ranks,
        network: Network | None = None,
    ) -> None:
        self.name, self.modules, self.optimizer = name, modules, optimizer
        self.config, self.average, self.ranks, self.network = config, average, ranks, network
        self.directory = None if run is None else run.checkpoints
        self.identity = identity(images) if run is not None else {}
        self.saved = time.monotonic()

    def restore(self) -> int:
        """Load the checkpoint if there is one; returns the number of steps done.

        Raises:
            UserError: the checkpoint is damaged, of another model, of other settings or of other training images.
        """
        checkpoint = None if self.directory is None else load_checkpoint(self.directory, self.name)
        if checkpoint is None or self.directory is None:
            return 0
        source, tensors = self.directory / f"{self.name}.json", checkpoint.tensors
        require_provenance(self.directory, self.name, self.config, checkpoint.about)
        self._require_same_images(checkpoint)
        if "choices" in checkpoint.about:  # other kernels would give other bits
            choice.follow(checkpoint.about["choices"])
        for name, module in self.modules.items():
            load_module(module, tensors, f"{name}.", source)
        if self.network is not None:
            self.network.scatter()
        for name, parameter in self._parameters():
            momentum = self._tensor(checkpoint, f"momentum.{name}", parameter, source)
            if momentum is not None:
                # In the layout of the parameter (channels-last), as before the checkpoint was written.
                buffer = torch.empty_like(parameter.detach())
                buffer.copy_(sharded_as(momentum.to(parameter.device), parameter))
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        for name, _, mean in self.average.pairs:
            saved = self._tensor(checkpoint, f"average.{name}", mean, source)
            if saved is not None:
                mean.copy_(sharded_as(saved.to(mean.device), mean))
        return checkpoint.step

    def _tensor(self, checkpoint: Checkpoint, name: str, like: Tensor, source: Path) -> Tensor | None:
        found = checkpoint.tensors.get(name)
        if found is not None and (found.shape != like.shape or found.dtype != like.dtype):
            raise UserError(
                f"the checkpoint {source} is damaged: `{name}` expected {shape_of(like)} {like.dtype}, received "
                f"{shape_of(found)} {found.dtype}; delete it to start this stage anew"
            )
        return found

    def _require_same_images(self, checkpoint: Checkpoint) -> None:
        trained = checkpoint.about.get("images", self.identity)
        difference = None
        if trained != self.identity:
            difference = f"{trained['count']} then, {self.identity['count']} now"
            if trained["count"] == self.identity["count"]:
                difference = "other files"
        for statistic in ("mean", "std"):
            then = checkpoint.tensors.get(f"model.{statistic}")
            now = None if then is None else self.modules["model"].get_buffer(statistic).cpu()
            if then is not None and now is not None and then.shape == now.shape and not torch.allclose(then, now):
                difference = difference or "other pixels"
        if difference is not None:
            raise UserError(
                f"the training images are not those the run began with ({difference}); "
                "restore them, or train a new run in another directory"
            )

    def step_done(self, done: int, steps: int, monitor: Monitor, request: Request) -> None:
        """Write the checkpoint where it is due: every so many minutes or steps, after the last step, before a stop.

        Args:
            done: steps done.
            steps: steps of the stage.
            monitor: writes its rows up to this step first.
            request: of a signal.

        Raises:
            Interrupted: a signal has asked to stop; the state is saved.
            UserError: a weight is not finite, or the checkpoint cannot be written.
        """
        run = self.config.run
        minutes = (time.monotonic() - self.saved) / 60
        by_steps = run.checkpoint_every > 0 and done % run.checkpoint_every == 0
        by_time = 0 < run.checkpoint_minutes <= minutes
        # The processes stop after the same step, and save together.
        signal, late = self.ranks.largest(request.signal or 0, int(by_time))
        if self.directory is not None and (done == steps or by_steps or late or signal):
            monitor.flush()
            self.save(done)
        if signal:
            raise Interrupted(signal)

    def save(self, done: int) -> None:
        """Write everything that the stage needs to resume with identical bits; all processes call it.

        Args:
            done: steps done.
        """
        if self.directory is None:
            return
        self.saved = time.monotonic()
        if self.network is not None:
            self.network.gather()
        momenta = ((name, self.optimizer.state.get(p, {}).get("momentum_buffer")) for name, p in self._parameters())
        others = {f"momentum.{name}": whole(value) for name, value in momenta if value is not None}
        others.update({f"average.{name}": whole(mean) for name, _, mean in self.average.pairs})
        if self.ranks.first:
            self._write(done, others)
        self.ranks.wait()  # a process that left now would end the job

    def _write(self, done: int, others: Mapping[str, Tensor]) -> None:
        assert self.directory is not None
        tensors = {
            f"{name}.{key}": x for name, module in self.modules.items() for key, x in module.state_dict().items()
        }
        device = next(parameter.device.type for _, parameter in self._parameters())
        about = {**provenance(self.directory, self.name, self.config), "images": self.identity}
        about["choices"] = choice.choices_made(device)
        save_checkpoint(self.directory, self.name, done, {**tensors, **others}, about)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names in the checkpoint, and the parameters that the optimiser has."""
        if self.network is not None:
            return [(f"model.{name}", p) for name, p in self.network.parameters()]
        return [(f"{name}.{key}", p) for name, module in self.modules.items() for key, p in module.named_parameters()]
