"""A whole run: data, stage 1, stage 2, and the scorer that is fitted to the trained model."""

from __future__ import annotations

from pathlib import Path

import torch

from anomem import backends
from anomem.data import Task, load_task
from anomem.errors import UserError
from anomem.models import AnoMem, DeviationHead, Encoder, build_model, describe
from anomem.scoring import Scorer, fit_scorer
from anomem.train.checkpoint import load_checkpoint, load_module, save_checkpoint
from anomem.train.config import RunConfig, TrainConfig
from anomem.train.rundir import RunDirectory
from anomem.train.stage1 import train_stage1
from anomem.train.stage2 import train_stage2
from anomem.validation import require

SCORER = "scorer"


def train(
    config: TrainConfig, *, task: Task | None = None, encoder: Encoder | None = None, quiet: bool = False
) -> Path:
    """Train a new run.

    Args:
        config: of the run.
        task: your own images (`anomem.data.task_from_dataset`), in place of the data set of `config.data`.
        encoder: your own (`anomem.models.NetworkEncoder`), in place of the backbone of `config.model`; trained in
            place.
        quiet: show nothing.

    Returns:
        The run directory.

    Raises:
        UserError: the directory already holds a run, data are missing, or a setting does not fit the data.

    Example:
        >>> run = train(preset("digits"))
        >>> scorer = load_scorer(run)
        >>> scorer(images).scores["detector"]  # [B]
    """
    prepare(config)
    if task is not None:
        exposed = not bool(task.train_is_normal.all())
        require(
            exposed == (config.data.outlier_ratio > 0),
            "config.data.outlier_ratio",
            "a ratio > 0 where the task has labelled anomalies to train on, and 0 where it has none",
            config.data.outlier_ratio,
            "make the task from `config.data`",
        )
    given = {"task": task, "encoder": encoder}
    # Task and model first: where one of them cannot be made, no folder is left behind.
    task = task or load_task(config.data)
    model = model_for(config, task, encoder)
    run = RunDirectory.create(config, [name for name, value in given.items() if value is not None])
    _complete(run, config, task, model, quiet)
    return run.path


def resume(path: Path, *, task: Task | None = None, encoder: Encoder | None = None, quiet: bool = False) -> Path:
    """Continue a run that was stopped; a finished one is left as it is.

    Args:
        path: the run directory.
        task: the one given to `train`, if any.
        encoder: the one given to `train`, if any; its weights are loaded from the checkpoint.
        quiet: show nothing.

    Raises:
        UserError: no run there, a damaged checkpoint, or a task or an encoder is missing.
    """
    run, config = RunDirectory.open(path)
    if load_checkpoint(run.checkpoints, SCORER) is None:
        run.require_given("resume", task=task, encoder=encoder)
        prepare(config)
        task = task or load_task(config.data)
        _complete(run, config, task, model_for(config, task, encoder), quiet)
    return run.path


def load_scorer(path: Path, *, encoder: Encoder | None = None) -> Scorer:
    """The scorer of a finished run, on the run's device; the training data are not needed.

    Args:
        path: the run directory.
        encoder: one like that given to `train`, if any; the run's weights are loaded into it.

    Raises:
        UserError: no run there, an unfinished one, a damaged checkpoint, or the encoder is missing.
    """
    run, config = RunDirectory.open(path)
    run.require_given("load_scorer", encoder=encoder)
    checkpoint = load_checkpoint(run.checkpoints, SCORER)
    if checkpoint is None:
        raise UserError(f"the run {path} is not finished; continue it with `anomem train --resume {path}`")
    prepare(config)
    about = checkpoint.about
    channels = int(about["channels"])
    height, width = about["image_size"]
    # Mean and standard deviation of the images are among the tensors.
    model = build_model(config.model, (height, width), channels, [0.0] * channels, [1.0] * channels, encoder=encoder)
    model.to(device_of(config.run))
    head = head_for(config, model) if config.has_stage2 else None
    scorer = Scorer(model, about["alignment"], config.score, head)
    load_module(scorer, checkpoint.tensors, "", run.checkpoints / f"{SCORER}.json")
    return scorer


def load_run(path: Path) -> tuple[RunDirectory, TrainConfig, Task, Scorer]:
    """A finished run with its task and scorer, on the run's device.

    Args:
        path: the run directory.

    Raises:
        UserError: as `load_scorer`, or the data are missing or have no test images.
    """
    run, config = RunDirectory.open(path)
    run.require_given("anomem.evaluate.report", task=None)
    scorer = load_scorer(path)
    task = load_task(config.data)
    if not len(task.test):
        raise UserError(
            f"the run {path} has no test images to measure: expected normal and anomalous ones in folders of "
            f"{Path(config.data.root) / 'test'}; add some, or score files with `anomem score --run {path} FILES`"
        )
    return run, config, task.to(device_of(config.run)), scorer


def prepare(config: TrainConfig) -> None:
    """Process-wide settings of a run."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)


def device_of(config: RunConfig) -> torch.device:
    """The device of a run.

    Raises:
        UserError: this machine has no such device.
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


def train_task(
    config: TrainConfig, task: Task, model: AnoMem, run: RunDirectory | None = None, *, quiet: bool = False
) -> Scorer:
    """Train both stages on a task in memory and fit the scorer.

    Args:
        config: of the run; `config.data` only decides whether stage 2 runs.
        task: on the device of the run.
        model: fresh, on the same device.
        run: gets logs and checkpoints; None writes neither.
        quiet: show nothing.
    """
    is_normal = None if bool(task.train_is_normal.all()) else task.train_is_normal
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.run.compile:
        model.encoder.compile()
    train_stage1(model, task.train, is_normal, config, run, quiet=quiet)
    head = None
    if config.has_stage2:
        head = head_for(config, model)
        train_stage2(model, head, task.train, is_normal, config, run, quiet=quiet)
    return fit_scorer(
        model,
        task.train,
        task.train_is_normal,
        aligned=task.aligned,
        augment=config.augment,
        config=config.score,
        head=head,
    )


def model_for(config: TrainConfig, task: Task, encoder: Encoder | None = None) -> AnoMem:
    """A fresh model for a task, on the device of the run, with your own encoder if one is given."""
    images = task.train
    model = build_model(config.model, images.size, images.channels, task.mean, task.std, config.run.seed, encoder)
    model.to(device_of(config.run))
    for features in model.features:  # raises where the implementation cannot run, before anything is written
        backends.choose(backends.Problem("retrieve", model.device.type, torch.float32, features), config.model.impl)
    return model


def head_for(config: TrainConfig, model: AnoMem) -> DeviationHead:
    """A fresh stage-2 head for a model, on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        sizes, stage2 = model.encoder.sizes, config.stage2
        head = DeviationHead(model.features, sizes, model.scale_weights, stage2.hidden, stage2.embedding)
    return head.to(model.device)


def _complete(run: RunDirectory, config: TrainConfig, task: Task, model: AnoMem, quiet: bool) -> None:
    if not quiet:
        print(f"{task.name}: {len(task.train)} training images, {len(task.test)} test images")
        print(describe(model), flush=True)
    scorer = train_task(config, task.to(model.device), model, run, quiet=quiet)
    about = {
        "image_size": list(task.train.size),
        "channels": task.train.channels,
        "alignment": scorer.detector.alignment,
    }
    save_checkpoint(run.checkpoints, SCORER, config.optimizer.steps, scorer.state_dict(), about)
