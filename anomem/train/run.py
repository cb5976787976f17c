"""A whole run: data, stage 1, stage 2, and the scorer that is fitted to the trained model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from anomem import backends, rules
from anomem.data import Task, load_task
from anomem.errors import UserError, enough_memory
from anomem.models import AnoMem, DeviationHead, Encoder, build_model, describe
from anomem.models.encoders import SMALL_IMAGE
from anomem.scoring import NormalQueries, Scorer, fill_memories, fit_scorer, useless_scores
from anomem.scoring.detector import BYTES, kept_features
from anomem.scoring.scorer import alignment_of
from anomem.train.balance import few_labels
from anomem.train.checkpoint import (
    load_checkpoint,
    load_module,
    provenance,
    require_provenance,
    save_checkpoint,
    saved_step,
)
from anomem.train.config import FitConfig, RunConfig, TrainConfig, flat_settings, read_json
from anomem.train.execution import settled
from anomem.train.monitor import tensorboard_writer
from anomem.train.ranks import ENDED, ONE, Ranks, is_of_another, joined, local_device
from anomem.train.rundir import STAGES, RunDirectory, remove_leftovers
from anomem.train.stage1 import train_stage1
from anomem.train.stage2 import train_stage2
from anomem.train.steps import batch_of
from anomem.train.stopping import Interrupted, stopping_at_once
from anomem.validation import require

SCORER = "scorer"
PROBE = 256
"""Largest number of training images whose scores decide whether a run is complete."""


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
        UserError: the directory already holds a run or is being trained, data are missing, a setting does not fit the
            data, or the trained model is useless.
        Interrupted: a signal stopped the training; the state is saved.

    Example:
        >>> run = train(preset("digits"))
        >>> scorer = load_scorer(run)
        >>> scorer(images).scores["detector"]  # [B]
    """
    if task is not None:
        exposed = not bool(task.train_is_normal.all())
        require(
            exposed == (config.data.outlier_ratio > 0),
            "config.data.outlier_ratio",
            "a ratio > 0 where the task has labelled anomalies to train on, and 0 where it has none",
            config.data.outlier_ratio,
            "make the task from `config.data`",
        )
    given = [name for name, value in (("task", task), ("encoder", encoder)) if value is not None]
    with prepared(config), joined(config.run.device) as ranks:
        # Task and model first: where one of them cannot be made, no folder is left behind.
        task = task or load_task(config.data)
        model = model_for(config, task, encoder)
        # Without "auto": a resumption executes as the run began.
        config = settled(config, model.device)
        ranks.require_same(flat_settings(config))
        require_batches(config, len(task.train), ranks)
        trained_on = task.trained_on
        run = RunDirectory(ranks.on_first(lambda: RunDirectory.create(config, given, trained_on).path))
        with _stoppable(run, ranks), _claimed(run, ranks):
            _complete(run, config, task, model, quiet, ranks)
    return run.path


def resume(path: Path, *, task: Task | None = None, encoder: Encoder | None = None, quiet: bool = False) -> Path:
    """Continue a run that was stopped; a finished one is left as it is.

    Args:
        path: the run directory.
        task: the one given to `train`, if any.
        encoder: the one given to `train`, if any; its weights are loaded from the checkpoint.
        quiet: show nothing.

    Raises:
        UserError: no run there, one that is being trained, a damaged checkpoint, an edited setting, other training
            images, or a task or an encoder is missing.
        Interrupted: a signal stopped the training; the state is saved.
    """
    run, config = RunDirectory.open(path)
    if _finished(run, config):
        return run.path
    run.require_given("resume", task=task, encoder=encoder)
    with joined(config.run.device) as ranks:
        ranks.require_same(flat_settings(config))
        with _stoppable(run, ranks), _claimed(run, ranks):
            # Read again: the process that held the claim before may have finished the run.
            if not ranks.on_first(lambda: _finished(run, config)):
                with prepared(config):
                    task = task or load_task(config.data, run.split())
                    require_batches(config, len(task.train), ranks)
                    _complete(run, config, task, model_for(config, task, encoder), quiet, ranks)
    return run.path


def load_scorer(path: Path, *, encoder: Encoder | None = None, device: str | None = None) -> Scorer:
    """The scorer of a finished run, on the run's device; the training data are not needed.

    Args:
        path: the run directory.
        encoder: one like that given to `train`, if any; the run's weights are loaded into it.
        device: another one than the run's.

    Raises:
        UserError: no run there, an unfinished one, a checkpoint that is damaged, of another run or of other settings,
            or the encoder is missing.
    """
    run, config = RunDirectory.open(path, device=device)
    run.require_given("load_scorer", encoder=encoder)
    checkpoint = load_checkpoint(run.checkpoints, SCORER)
    if checkpoint is None:
        raise UserError(f"the run {path} is not finished; continue it with `anomem train --resume {path}`")
    about, source = checkpoint.about, run.checkpoints / f"{SCORER}.json"
    require_provenance(run.checkpoints, SCORER, config, about)
    try:
        channels, (height, width) = int(about["channels"]), about["image_size"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {source} is damaged ({error}); delete it, then resume the run") from error
    # Mean and standard deviation of the images are among the tensors.
    model = build_model(config.model, (height, width), channels, [0.0] * channels, [1.0] * channels, encoder=encoder)
    model.to(device_of(config.run))
    head = head_for(config, model) if config.has_stage2 else None
    scorer = Scorer(model, about["alignment"], config.score, head)
    load_module(scorer, checkpoint.tensors, "", source)
    return scorer


def load_run(
    path: Path, *, device: str | None = None, root: str | None = None
) -> tuple[RunDirectory, TrainConfig, Task, Scorer]:
    """A finished run with its task and scorer, on the run's device.

    Args:
        path: the run directory.
        device: another one than the run's.
        root: another folder of images than the run's.

    Raises:
        UserError: as `load_scorer`, or the data are missing or have no test images.
    """
    run, config = RunDirectory.open(path, device=device, root=root)
    run.require_given("anomem.evaluate.report", task=None)
    scorer = load_scorer(path, device=device)
    for folder in (run.path, run.figures):
        remove_leftovers(folder, older_than=3600)
    task = load_task(config.data, run.split())
    if not len(task.test):
        raise UserError(
            f"the run {path} has no test images to measure: expected normal and anomalous ones in folders of "
            f"{Path(config.data.root) / 'test'}; add some, or score files with `anomem score --run {path} FILES`"
        )
    return run, config, task.to(device_of(config.run)), scorer


@contextmanager
def prepared(config: TrainConfig | FitConfig) -> Iterator[None]:
    """Around a training or a fit: the process has the run's threads, and its own again afterwards.

    Raises:
        UserError: a package that the run writes with is not installed.
    """
    if config.run.tensorboard:
        tensorboard_writer()
    threads = torch.get_num_threads()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def device_named(path: Path) -> str:
    """`run.device` of a run, trained or fitted.

    Raises:
        UserError: no run there, or a damaged configuration.
    """
    values = read_json(RunDirectory(path).config_file) if RunDirectory(path).config_file.exists() else {}
    run = values.get("run") if isinstance(values, dict) else None
    return str(run.get("device", "auto")) if isinstance(run, dict) else "auto"


def device_of(config: RunConfig) -> torch.device:
    """The device of a run.

    Raises:
        UserError: this machine has no such device.
    """
    wanted = local_device(config.device)
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch's explain where to read on
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

    Example:
        >>> scorer = train_task(config, task, model_for(config, task), quiet=True)
    """
    scorer = _train_and_fit(config, task, model, run, not quiet, quiet)
    assert scorer is not None
    return scorer


def _train_and_fit(
    config: TrainConfig, task: Task, model: AnoMem, run: RunDirectory | None, loud: bool, quiet: bool
) -> Scorer | None:
    """`train_task`; of several processes the first one fits the scorer, the others return None."""
    is_normal = None if bool(task.train_is_normal.all()) else task.train_is_normal
    config = settled(config, model.device)
    if config.optimizer.steps:
        train_stage1(model, task.train, is_normal, config, run, quiet=not loud)
    else:
        _fill(model, task, config)
    head = None
    if config.has_stage2:
        advice = None if is_normal is None else few_labels(is_normal)
        if advice is not None and not quiet:
            print(advice, flush=True)
        head = head_for(config, model)
        train_stage2(model, head, task.train, is_normal, config, run, quiet=not loud)
    if not Ranks.current().first:
        return None
    if not quiet:
        print(f"fitting the scores to {len(task.train)} images and {config.score.copies} copies of each", flush=True)
    with enough_memory("--score.batch-size, --score.detector-megabytes or --data.image-size"):
        return fit_scorer(
            model,
            task.train,
            task.train_is_normal,
            aligned=task.aligned,
            augment=config.augment,
            config=config.score,
            head=head,
        )


def _fill(model: AnoMem, task: Task, config: TrainConfig) -> None:
    """Fill the memories with k-means centres of the features of all normals, in place of stage 1.

    Raises:
        ArgumentError: fewer features of a scale than prototypes.
    """
    normals = task.train_is_normal.nonzero().flatten()
    queries = NormalQueries(model, lambda: (x for x, _ in task.train.batches(normals, config.score.batch_size)))
    wanted = [len(memory.prototypes) for memory in model.memories]
    for scale, count in zip(fill_memories(model, queries, wanted, seed=config.run.seed), wanted, strict=True):
        allowed = f"at most {scale.rows}, the features of normals at scale {scale.name}"
        require(scale.prototypes == count, "model.prototypes", allowed, count)


def model_for(config: TrainConfig, task: Task, encoder: Encoder | None = None) -> AnoMem:
    """A fresh model for a task, on the device of the run, with your own encoder if one is given."""
    images = task.train
    with enough_memory("--model.prototypes, --model.projection or --data.image-size"):
        model = build_model(config.model, images.size, images.channels, task.mean, task.std, config.run.seed, encoder)
        model.to(device_of(config.run))
    for features in model.features:  # raises where the implementation cannot run, before anything is written
        backends.choose(rules.Problem("retrieve", model.device.type, torch.float32, features), config.model.impl)
    return model


def head_for(config: TrainConfig, model: AnoMem) -> DeviationHead:
    """A fresh stage-2 head for a model, on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        sizes, stage2 = model.encoder.sizes, config.stage2
        head = DeviationHead(model.features, sizes, model.scale_weights, stage2.hidden, stage2.embedding)
    return head.to(model.device)


def _finished(run: RunDirectory, config: TrainConfig) -> bool:
    checkpoint = load_checkpoint(run.checkpoints, SCORER)
    if checkpoint is not None:
        require_provenance(run.checkpoints, SCORER, config, checkpoint.about)
    return checkpoint is not None


@contextmanager
def _stoppable(run: RunDirectory, ranks: Ranks = ONE) -> Iterator[None]:
    """Around a training: where a signal or the end of another process ends it, a sentence says what was saved and how
    to continue.
    """
    try:
        with stopping_at_once():
            yield
    except KeyboardInterrupt as stop:
        number = int(getattr(stop, "signal", 2))
        if not ranks.first:
            raise SystemExit(128 + number) from None
        if not run.config_file.exists():
            raise
        raise Interrupted(number, f"stopped; {_how_to_continue(run, ranks)}") from None
    except RuntimeError as error:
        if not is_of_another(error, ranks) or not run.config_file.exists():
            raise
        if not ranks.first:
            raise SystemExit(2) from error
        raise UserError(f"{ENDED}; {_how_to_continue(run, ranks)}") from error


def _how_to_continue(run: RunDirectory, ranks: Ranks) -> str:
    """What is saved of a run, and the command that goes on with it."""
    state = "no checkpoint yet: it will begin anew"
    for stage in STAGES:
        with suppress(UserError):
            step = saved_step(run.checkpoints, stage)
            state = state if step is None else f"{stage} is saved up to step {step}"
    here = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.count))  # processes of this machine, from torchrun
    start = "anomem" if ranks.count == 1 else f"torchrun --nproc-per-node {here} -m anomem"
    return f"{state}; continue with `{start} train --resume {shlex.quote(str(run.path))}`"


def _say_what_costs(run: RunDirectory, config: TrainConfig, task: Task, model: AnoMem) -> None:
    """Print what decides the time and the memory of a run, before it begins."""
    if config.model.backbone != "small" and config.model.stem == "auto" and max(task.train.size) <= SMALL_IMAGE:
        print(f"stem: small, because images of up to {SMALL_IMAGE} pixels keep their resolution; standard is faster")
    alignment = alignment_of(config.score, task.aligned)
    positions = [height * width for height, width in model.encoder.sizes]
    if alignment == "per_position":
        kept = kept_features(positions, model.features, config.score.detector_megabytes)
        numbers = sum(p * d**2 for p, d in zip(positions, kept, strict=True))
        channels = "" if kept == model.features else f"; channels projected from {model.features} to {kept}"
        print(f"detector: one Gaussian per position, {numbers * BYTES / 1e9:.2g} GB while it is fitted{channels}")
    images, batch = len(task.train), config.optimizer.batch_size
    if config.optimizer.steps and batch > images:
        print(f"batch: all {images} training images, fewer than optimizer.batch_size {batch}")
    stages = (
        f"{config.optimizer.steps} steps" if config.optimizer.steps else "none, memories are filled from all normals"
    )
    if config.has_stage2:
        stages += f", then {config.stage2.optimizer.steps} of stage 2"
    every = f" and every {config.run.checkpoint_minutes:g} min" if config.run.checkpoint_minutes else ""
    every += f" and every {config.run.checkpoint_every} steps" if config.run.checkpoint_every else ""
    print(f"training: {stages}; checkpoints in {run.checkpoints} at the end of each stage{every}", flush=True)


def require_batches(config: TrainConfig, images: int, ranks: Ranks) -> None:
    """Check that a set's batches can be shared: every process has an image of every part of one.

    Raises:
        UserError: in the first process. The others leave without a word.
    """
    for optimizer in (config.optimizer, *([config.stage2.optimizer] if config.has_stage2 else [])):
        batch, parts = batch_of(images, optimizer), optimizer.accumulate
        if batch // parts < ranks.count:
            if not ranks.first:
                raise SystemExit(2)
            of_parts, remedy = (
                (f" in each of {parts} parts of a batch", " or accumulate fewer parts") if parts > 1 else ("", "")
            )
            raise UserError(
                f"`{optimizer.section}.batch_size`: expected an image for each of {ranks.count} processes{of_parts}, "
                f"received {batch}; start fewer processes{remedy}"
            )


@contextmanager
def _claimed(run: RunDirectory, ranks: Ranks) -> Iterator[None]:
    """`RunDirectory.claimed` by the first process, for all."""
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(run.claimed()))
        yield


def _complete(
    run: RunDirectory, config: TrainConfig, task: Task, model: AnoMem, quiet: bool, ranks: Ranks = ONE
) -> None:
    loud = not ranks.on_first(lambda: quiet)  # all processes log after the same steps
    quiet = quiet or not ranks.first
    if not quiet:
        print(f"{task.name}: {len(task.train)} training images, {len(task.test)} test images")
        print(describe(model))
        _say_what_costs(run, config, task, model)
    task = task.to(model.device)
    scorer = _train_and_fit(config, task, model, run, loud, quiet)
    if scorer is None:
        return
    useless = useless_scores(scorer, task.train, PROBE)
    if useless:
        raise UserError(
            f"the run {run.path} is not complete: the scores of its own training images are {useless}; the training "
            "has diverged or collapsed: train a new run with a lower --optimizer.learning-rate (of stage 2: "
            "--stage2.optimizer.learning-rate)"
        )
    about = {
        "image_size": list(task.train.size),
        "channels": task.train.channels,
        "alignment": scorer.detector.alignment,
        **provenance(run.checkpoints, SCORER, config),
    }
    save_checkpoint(run.checkpoints, SCORER, config.optimizer.steps, scorer.state_dict(), about)
