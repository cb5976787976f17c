"""The figures of a run: every score, control and baseline on the same split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from anomem.augment import AugmentConfig
from anomem.data import Images, Task
from anomem.evaluate.baselines import baselines
from anomem.evaluate.metrics import aupro, auroc, average_precision, fpr_at_tpr, pixel_auroc
from anomem.models import AnoMem
from anomem.scoring import Scored, Scorer, fit_scorer, score_images
from anomem.scoring.scorer import fit_feature_detector, plain_variants
from anomem.train import TrainConfig, model_for, train_task
from anomem.validation import require_choice

Control = Literal["untrained", "one_prototype"]
Metrics = dict[str, dict[str, float]]
"""Name of a score -> name of a measure -> number."""
IMAGE_MEASURES = ("auroc", "average_precision", "fpr_at_95_tpr")
PIXEL_MEASURES = ("pixel_auroc", "aupro")
MEANINGS = {
    "stage2": "radius of the heads trained on anomalies",
    "detector": "distance from Gaussians fitted to the deviations of the training normals",
    "plain": "deviation of the features from what the memory returns",
    "prior": "plain, with the prototypes that normals have at each position",
    "energy": "Hopfield energy of the features",
    "detector/features": "control without memory: the same Gaussians on the features",
}
"""What each score is, as the table is explained; variants of "plain" are explained by their parts."""


def explained(metrics: Mapping[str, Any]) -> list[str]:
    """What the rows of a run's table mean, and which measures are missing and why; one line each.

    Args:
        metrics: the content of `metrics.json`.
    """
    scores = metrics["scores"]
    default = "stage2" if "stage2" in scores else "detector"
    lines = []
    for name, meaning in MEANINGS.items():
        if name in scores:
            lines.append(f"{name}: {meaning}{'; what `anomem score` prints' if name == default else ''}")
    if any(name.startswith("plain/") for name in scores):
        lines.append(
            "plain/DISTANCE-POOL: plain by another distance (cosine, l2) and another pooling of the positions (mean, "
            "max, topk: the mean of the largest tenth, as score.top_fraction says)"
        )
    if metrics["controls"]:
        lines.append("untrained, one_prototype: controls that should be worse; the same scores of another model")
    if metrics["baselines"]:
        lines.append("raw pixels: classical detectors on the pixels, without a network")
    reasons: dict[str, list[str]] = {}
    for measure, reason in metrics["missing"].items():
        reasons.setdefault(reason, []).append(measure)
    return lines + [f"not measured: {', '.join(measures)}: {reason}" for reason, measures in reasons.items()]


def undefined_measures(task: Task) -> dict[str, str]:
    """Measures that cannot be taken of a task's test images, and why.

    Args:
        task: on any device.

    Returns:
        Name of a measure -> the reason. Empty where all can be taken.
    """
    missing = {}
    anomalies, images = int(task.test_is_anomaly.sum()), len(task.test)
    if anomalies in (0, images):
        only = "normal" if anomalies == 0 else "anomalous"
        missing = dict.fromkeys(IMAGE_MEASURES, f"all {images} test images are {only}")
    if task.test_masks is None:
        reason = "there are no masks"
    elif not bool(task.test_masks.any()):
        reason = "no mask has an anomalous pixel"
    else:
        reason = "no mask has a normal pixel" if bool(task.test_masks.all()) else ""
    if reason:
        missing |= dict.fromkeys(PIXEL_MEASURES, reason)
    elif find_spec("skimage") is None:
        missing["aupro"] = "it needs the package scikit-image, which is not installed; pip install anomem[lab]"
    return missing


def image_metrics(scores: Mapping[str, Tensor], is_anomaly: Tensor) -> Metrics:
    """AUROC, average precision and false-positive rate at 95% true positives of every score.

    Args:
        scores: name -> [T], higher is more anomalous.
        is_anomaly: [T] bool.

    Returns:
        Empty for every score where the test images are of one class only.
    """
    truth = is_anomaly.cpu()
    if bool(truth.all()) or not bool(truth.any()):
        return {name: {} for name in scores}
    return {
        name: {
            "auroc": auroc(values, truth),
            "average_precision": average_precision(values, truth),
            "fpr_at_95_tpr": fpr_at_tpr(values, truth),
        }
        for name, values in scores.items()
    }


def evaluate_scorer(scorer: Scorer, task: Task, augment: AugmentConfig, scored: Scored | None = None) -> Metrics:
    """Measures of all scores of a scorer, the control on raw features and every variant of the plain deviation.

    Args:
        scorer: fitted to the task's training normals.
        task: on any device.
        augment: training augmentations, for the control's copies.
        scored: the test images' scores and maps, if they are known already.

    Returns:
        One entry per score, with the measures that are defined; "plain" and "detector" have "pixel_auroc" and "aupro"
        too where the task has masks.
    """
    task = task.to(scorer.model.device)
    scored = scored or score_images(scorer, task.test)
    scores = {**scored.scores, "detector/features": feature_scores(scorer, task, augment)}
    metrics = image_metrics({**scores, **plain_variants(scorer, task.test)}, task.test_is_anomaly)
    measures = {"pixel_auroc": pixel_auroc, "aupro": aupro}
    missing = undefined_measures(task)
    for name, maps in scored.maps.items():
        for measure in PIXEL_MEASURES:
            if measure not in missing and task.test_masks is not None:
                metrics[name][measure] = measures[measure](maps, task.test_masks.cpu())
    return metrics


@torch.no_grad()
def feature_scores(scorer: Scorer, task: Task, augment: AugmentConfig) -> Tensor:
    """Scores [T] of the same detector on z instead of z − HF(z)."""
    alignment = scorer.detector.alignment
    model = scorer.model
    detector = fit_feature_detector(model, task.train, task.train_is_normal, alignment, augment, scorer.config)
    parts = [
        detector(model.queries(model(batch)))
        for batch, _ in task.test.batches(torch.arange(len(task.test)), scorer.config.batch_size)
    ]
    return torch.cat(parts).cpu()


def report(
    scorer: Scorer,
    task: Task,
    augment: AugmentConfig,
    *,
    scored: Scored | None = None,
    seed: int = 0,
    controls: Mapping[str, Scorer] | None = None,
    with_baselines: bool = True,
) -> dict[str, Any]:
    """The content of `metrics.json`; "missing" says which measures are not defined, and why.

    Args:
        scorer: fitted.
        task: on any device.
        augment: training augmentations.
        scored: the test images' scores and maps, if they are known already.
        seed: of the baselines.
        controls: name -> scorer of a control, fitted to the same task.
        with_baselines: also fit the shallow baselines (needs scikit-learn).
    """
    shallow = baselines(task.to("cpu"), seed) if with_baselines else {}
    return {
        "task": task.name,
        "train_images": len(task.train),
        "train_anomalies": int((~task.train_is_normal).sum()),
        "test_images": len(task.test),
        "test_anomalies": int(task.test_is_anomaly.sum()),
        "alignment": scorer.detector.alignment,
        "missing": undefined_measures(task),
        "scores": evaluate_scorer(scorer, task, augment, scored),
        "controls": {name: evaluate_scorer(control, task, augment) for name, control in (controls or {}).items()},
        "baselines": image_metrics(shallow, task.test_is_anomaly),
    }


def control(name: Control, config: TrainConfig, task: Task, *, quiet: bool = True) -> Scorer:
    """A control: a scorer fitted to the same training normals with the same seed.

    "untrained": the same encoder without a gradient step, with calibrated batch-norm statistics and memories filled
    with its eval-mode features. "one_prototype": the whole training with M = 1 at every scale.

    Args:
        name: "untrained" or "one_prototype".
        config: of the run.
        task: on the device of the run.
        quiet: show no training.
    """
    require_choice(name, "controls", get_args(Control))
    if name == "one_prototype":
        single = replace(config, model=replace(config.model, prototypes=(1,)))
        return train_task(single, task, model_for(single, task), quiet=quiet)
    model = model_for(config, task)
    calibrate_untrained(model, task.train, task.train_is_normal, config.score.batch_size, config.run.seed)
    return fit_scorer(
        model, task.train, task.train_is_normal, aligned=task.aligned, augment=config.augment, config=config.score
    )


@torch.no_grad()
def calibrate_untrained(model: AnoMem, images: Images, is_normal: Tensor, batch_size: int = 256, seed: int = 0) -> None:
    """Adapt a fresh model to the training images without a gradient step.

    Averages the batch-norm statistics over the training normals, then fills each memory with eval-mode features.

    Args:
        model: fresh, on the device of the images; left in eval mode.
        images: training images.
        is_normal: [N] bool.
        batch_size: images per forward pass.
        seed: of the choice of features.
    """
    normals = is_normal.nonzero().flatten()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    model.train()
    for batch, _ in images.batches(normals, batch_size):
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    fill_from_features(model, images, is_normal, batch_size, seed)


@torch.no_grad()
def fill_from_features(model: AnoMem, images: Images, is_normal: Tensor, batch_size: int = 256, seed: int = 0) -> None:
    """Fill every memory with eval-mode features of training normals, drawn at random over images and positions.

    Args:
        model: on the device of the images; left in eval mode.
        images: training images.
        is_normal: [N] bool.
        batch_size: images per forward pass.
        seed: of the choice of features.
    """
    model.eval()
    normals = is_normal.nonzero().flatten()
    shuffled = normals[torch.randperm(len(normals), generator=torch.Generator().manual_seed(seed)).to(normals.device)]
    # A few hundred images hold far more positions than a memory has prototypes.
    batch, _ = next(iter(images.batches(shuffled[:batch_size], batch_size)))
    generator = torch.Generator(batch.device).manual_seed(seed)
    for query, memory in zip(model.queries(model(batch)), model.memories, strict=True):
        memory.fill(query.flatten(0, 1), generator)
