"""What is trained or fitted, and on which images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from anomem.data import Task
from anomem.evaluate.baselines import baselines, patch_pca_maps
from anomem.evaluate.fitted import report
from anomem.evaluate.metrics import pixel_auroc
from anomem.evaluate.report import Metrics, control, evaluate_scorer, fill_from_features, image_metrics
from anomem.scoring import fit_detector, fit_scorer
from anomem.train import FitConfig, TrainConfig, preset
from anomem.train.config import MemoryFormat, Precision
from anomem.train.fitting import SIZE, model_to_fit, resolved
from anomem.train.run import model_for, train_task

SYNTHETIC = 1.0
"""Synthetic outliers per normal image."""
EXPOSED = 0.1
"""Real labelled anomalies per normal training image."""

DIGITS = ("3", "8", "9")
OTHER_DIGITS = ("0", "1", "2", "4", "5", "6", "7")
PRECISIONS = ("one-class, float32", "one-class, bf16")
TEXTURES = ("brick", "grass", "gravel")

Configured = Callable[[TrainConfig], TrainConfig]
Measured = Callable[[TrainConfig, Task], Metrics]


def trained(config: TrainConfig, task: Task) -> Metrics:
    """The whole configuration, every score; "detector/features" is the detector without the memory."""
    scorer = train_task(config, task, model_for(config, task), quiet=True)
    return evaluate_scorer(scorer, task, config.augment)


def refilled(config: TrainConfig, task: Task) -> Metrics:
    """The trained encoder with its memories filled again, from its own features of the training normals."""
    model = model_for(config, task)
    train_task(config, task, model, quiet=True)
    fill_from_features(model, task.train, task.train_is_normal, config.score.batch_size, config.run.seed)
    scorer = fit_scorer(
        model, task.train, task.train_is_normal, aligned=task.aligned, augment=config.augment, config=config.score
    )
    return evaluate_scorer(scorer, task, config.augment)


def untrained(config: TrainConfig, task: Task) -> Metrics:
    """The same encoder without a gradient step; see `anomem.evaluate.report`."""
    return evaluate_scorer(control("untrained", config, task), task, config.augment)


def one_prototype(config: TrainConfig, task: Task) -> Metrics:
    """The same training with M = 1."""
    return evaluate_scorer(control("one_prototype", config, task), task, config.augment)


def fitted(config: TrainConfig, task: Task) -> Metrics:
    """Nothing is trained: what `anomem fit` makes of the same normals, by the frozen encoder."""
    settings = resolved(FitConfig(data=config.data, run=config.run), quiet=True)
    detector, _ = fit_detector(
        model_to_fit(settings, task),
        task.train,
        task.train_is_normal,
        aligned=task.aligned,
        config=settings.fill,
        alpha=settings.alpha,
        seed=config.run.seed,
    )
    found: Metrics = report(detector, task, settings, with_baselines=False)["scores"]
    return found


def raw_pixels(config: TrainConfig, task: Task) -> Metrics:
    """Shallow baselines on raw pixels, and the residual of a patch PCA if there are masks."""
    metrics = image_metrics(baselines(task, config.run.seed), task.test_is_anomaly)
    if task.test_masks is not None:
        metrics["patch PCA"] = {"pixel_auroc": pixel_auroc(patch_pca_maps(task, config.run.seed), task.test_masks)}
    return metrics


def as_it_is(config: TrainConfig) -> TrainConfig:
    """The preset, without outliers."""
    return config


def at_fitted_size(config: TrainConfig) -> TrainConfig:
    """The size that `anomem fit` takes for a folder."""
    return replace(config, data=replace(config.data, image_size=SIZE))


def with_synthetic(config: TrainConfig) -> TrainConfig:
    """Synthetic outliers in both stages."""
    return replace(config, synthetic_outliers=SYNTHETIC)


def with_exposure(config: TrainConfig) -> TrainConfig:
    """Real labelled anomalies of the other classes in both stages."""
    return replace(config, data=replace(config.data, outlier_ratio=EXPOSED))


def executed(precision: Precision, memory_format: MemoryFormat) -> Configured:
    """The preset in a precision and a memory format of its own, in place of what the machine would choose."""

    def change(config: TrainConfig) -> TrainConfig:
        return replace(config, run=replace(config.run, precision=precision, memory_format=memory_format))

    return change


SETTINGS: dict[str, tuple[Configured, Measured]] = {
    "one-class": (as_it_is, trained),
    "one-class, float32": (executed("float32", "contiguous"), trained),
    "one-class, bf16": (executed("bf16", "channels_last"), trained),
    "one-class, refilled": (as_it_is, refilled),
    "untrained": (as_it_is, untrained),
    "one prototype": (as_it_is, one_prototype),
    "raw pixels": (as_it_is, raw_pixels),
    "fit": (at_fitted_size, fitted),
    "synthetic outliers": (with_synthetic, trained),
    "outlier exposure": (with_exposure, trained),
}
"""Name -> change of the preset, and measurement."""


@dataclass(frozen=True)
class Job:
    """One setting on one task."""

    dataset: str
    normal: str
    anomalies: str
    """"classes", or for textures as in `DataConfig.anomalies`."""
    seed: int
    """Of the split, the weights and all other random numbers."""
    setting: str

    @property
    def config(self) -> TrainConfig:
        """The complete configuration."""
        config = preset(self.dataset)
        data = replace(config.data, normal=self.normal, seed=self.seed)
        if self.anomalies != "classes":
            data = replace(data, anomalies=self.anomalies)
        change, _ = SETTINGS[self.setting]
        return change(replace(config, data=data, run=replace(config.run, seed=self.seed, device="cpu")))


def jobs() -> Iterator[Job]:
    """Everything in the tables, most wanted first."""
    for seed in (0, 1):
        for setting in SETTINGS:
            for normal in DIGITS:
                yield Job("digits", normal, "classes", seed, setting)
        for setting in ("one-class", *PRECISIONS, "untrained", "raw pixels"):
            for normal in OTHER_DIGITS:
                yield Job("digits", normal, "classes", seed, setting)
        for anomalies in ("photographs", "scratch"):
            for setting in ("one-class", "one-class, refilled", "untrained", "one prototype", "raw pixels", "fit"):
                for normal in TEXTURES:
                    yield Job("textures", normal, anomalies, seed, setting)
    # One seed more for the comparison of precisions.
    for normal in (*DIGITS, *OTHER_DIGITS):
        for setting in PRECISIONS:
            yield Job("digits", normal, "classes", 2, setting)
