"""The figures of a run: every score and baseline on the same split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anomem.augment import AugmentConfig
from anomem.data import Task
from anomem.evaluate.baselines import baselines
from anomem.evaluate.metrics import aupro, auroc, average_precision, fpr_at_tpr, pixel_auroc
from anomem.evaluate.scoring import Scored, Scorer, fit_feature_detector, plain_variants, score_images

Metrics = dict[str, dict[str, float]]
"""Name of a score -> name of a measure -> number."""


def image_metrics(scores: Mapping[str, Tensor], is_anomaly: Tensor) -> Metrics:
    """AUROC, average precision and false-positive rate at 95% true positives of every score.

    Args:
        scores: name -> [T], higher is more anomalous.
        is_anomaly: [T] bool.
    """
    truth = is_anomaly.cpu()
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
        scored: what the scorer says about the test images, if that is known already.

    Returns:
        One entry per score; "plain" and "detector" have "pixel_auroc" and "aupro" too where the task has masks.
    """
    task = task.to(scorer.model.mean.device)
    scored = scored or score_images(scorer, task.test)
    scores = {**scored.scores, "detector/features": feature_scores(scorer, task, augment)}
    metrics = image_metrics({**scores, **plain_variants(scorer, task.test)}, task.test_is_anomaly)
    if task.test_masks is not None:
        masks = task.test_masks.cpu()
        for name, maps in scored.maps.items():
            metrics[name]["pixel_auroc"] = pixel_auroc(maps, masks)
            metrics[name]["aupro"] = aupro(maps, masks)
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
    """Everything `metrics.json` holds.

    Args:
        scorer: fitted.
        task: on any device.
        augment: training augmentations.
        scored: what the scorer says about the test images, if that is known already.
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
        "scores": evaluate_scorer(scorer, task, augment, scored),
        "controls": {name: evaluate_scorer(control, task, augment) for name, control in (controls or {}).items()},
        "baselines": image_metrics(shallow, task.test_is_anomaly),
    }
