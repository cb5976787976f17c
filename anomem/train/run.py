"""A whole run: data, stage 1, stage 2, and what is fitted to the trained model."""

from __future__ import annotations

from pathlib import Path

import torch

from anomem import backends
from anomem.data import Task, load_task
from anomem.errors import UserError
from anomem.evaluate.scoring import Scorer, check_score, fit_scorer
from anomem.models import AnoMem, DeviationHead, Encoder, build_model, describe
from anomem.train.checkpoint import load_checkpoint, load_module, save_checkpoint
from anomem.train.config import TrainConfig
from anomem.train.objective import scale_criterion
from anomem.train.optimizer import check_optimizer
from anomem.train.rundir import RunDirectory
from anomem.train.stage import device_of
from anomem.train.stage1 import train_stage1
from anomem.train.stage2 import check_stage2, train_stage2
from anomem.validation import require, require_count

SCORER = "scorer"


def train(
    config: TrainConfig, *, task: Task | None = None, encoder: Encoder | None = None, quiet: bool = False
) -> Path:
    """Train a new run.

    Args:
        config: everything it depends on, but for what follows.
        task: images of your own (`anomem.data.task_from_dataset`) instead of those `config.data` names.
        encoder: one of your own (`anomem.models.NetworkEncoder`) instead of `config.model`'s; trained in place.
        quiet: show nothing.

    Returns:
        The run directory.

    Raises:
        UserError: the directory already holds a run, data are missing, or a setting makes no sense.
    """
    # Before anything is written: a wrong setting leaves no folder behind.
    check_settings(config)
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
    task = task or load_task(config.data)
    model = model_for(config, task, encoder)
    run = RunDirectory.create(config, [name for name, value in given.items() if value is not None])
    _complete(run, config, task, model, quiet)
    return run.path


def resume(path: Path, *, task: Task | None = None, encoder: Encoder | None = None, quiet: bool = False) -> Path:
    """Go on with a run that was stopped; a finished one is left as it is.

    Args:
        path: the run directory.
        task: the one that was given to `train`, if one was.
        encoder: likewise; its weights come from the checkpoint.
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
    """The scorer of a finished run, on the run's device; needs none of the data it was trained on.

    Args:
        path: the run directory.
        encoder: one like that given to `train`, if one was; it is filled with the run's weights.

    Raises:
        UserError: no run there, one that is not finished, a damaged checkpoint, or its own encoder is missing.
    """
    run, config = RunDirectory.open(path)
    run.require_given("load_scorer", encoder=encoder)
    found = load_checkpoint(run.checkpoints, SCORER)
    if found is None:
        raise UserError(f"the run {path} is not finished; continue it with `anomem train --resume {path}`")
    prepare(config)
    about = found.about
    channels = int(about["channels"])
    height, width = about["image_size"]
    # Mean and deviation of the images come with the tensors.
    model = build_model(config.model, (height, width), channels, [0.0] * channels, [1.0] * channels, encoder=encoder)
    model.to(device_of(config.run))
    head = head_for(config, model) if has_stage2(config) else None
    scorer = Scorer(model, about["alignment"], config.score, head)
    load_module(scorer, found.tensors, "", run.checkpoints / f"{SCORER}.json")
    return scorer


def load_run(path: Path) -> tuple[RunDirectory, TrainConfig, Task, Scorer]:
    """A finished run with its task and scorer, on the run's device.

    Args:
        path: the run directory.

    Raises:
        UserError: as `load_scorer`, or the data are not there or hold no test images.
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


def check_settings(config: TrainConfig) -> None:
    """Raise `ArgumentError` for numbers no run can use."""
    check_optimizer(config.optimizer)
    check_stage2(config.stage2)
    check_score(config.score)
    scale_criterion(config.loss, config.model.impl)
    require(config.synthetic_outliers >= 0, "synthetic_outliers", "a ratio ≥ 0", config.synthetic_outliers)
    require_count(config.run.log_every, "run.log_every", 1)
    require_count(config.run.checkpoint_every, "run.checkpoint_every", 0)
    if config.run.threads is not None:
        require_count(config.run.threads, "run.threads", 1)


def prepare(config: TrainConfig) -> None:
    """Process-wide settings of a run."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)


def train_task(
    config: TrainConfig, task: Task, model: AnoMem, run: RunDirectory | None = None, *, quiet: bool = False
) -> Scorer:
    """Both stages and the fit of the scorer on a task that is in memory.

    Args:
        config: everything but the data.
        task: on the device of the run.
        model: fresh, on the same device.
        run: where logs and checkpoints go; None keeps neither.
        quiet: show nothing.
    """
    is_normal = None if bool(task.train_is_normal.all()) else task.train_is_normal
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.run.compile:
        model.encoder.compile()
    train_stage1(model, task.train, is_normal, config, run, quiet=quiet)
    head = None
    if has_stage2(config):
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
    """A fresh model for a task, on the device of the run, around an encoder of your own if one is given."""
    images = task.train
    model = build_model(config.model, images.size, images.channels, task.mean, task.std, config.run.seed, encoder)
    model.to(device_of(config.run))
    for memory in model.hopfield:  # before anything is written: an implementation that cannot run here
        device, features = model.mean.device.type, memory.prototypes.shape[1]
        backends.choose(backends.Problem("retrieve", device, torch.float32, features), config.model.impl)
    return model


def head_for(config: TrainConfig, model: AnoMem) -> DeviationHead:
    """A fresh stage-2 head for a model, on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        features = [memory.prototypes.shape[1] for memory in model.hopfield]
        head = DeviationHead(
            features, model.encoder.sizes, model.scale_weights, config.stage2.hidden, config.stage2.embedding
        )
    return head.to(model.mean.device)


def has_stage2(config: TrainConfig) -> bool:
    """Whether a run has a second stage: it is enabled and there are anomalies, labelled or synthetic."""
    return config.stage2.enabled and (config.data.outlier_ratio > 0 or config.synthetic_outliers > 0)


def _complete(run: RunDirectory, config: TrainConfig, task: Task, model: AnoMem, quiet: bool) -> None:
    if not quiet:
        print(f"{task.name}: {len(task.train)} training images, {len(task.test)} test images")
        print(describe(model), flush=True)
    scorer = train_task(config, task.to(model.mean.device), model, run, quiet=quiet)
    about = {
        "image_size": list(task.train.size),
        "channels": task.train.channels,
        "alignment": scorer.detector.alignment,
    }
    save_checkpoint(run.checkpoints, SCORER, config.optimizer.steps, scorer.state_dict(), about)
