"""Measures, baselines and scores of a task."""

from anomem.evaluate.baselines import baselines, patch_pca_maps
from anomem.evaluate.metrics import aupro, auroc, average_precision, fpr_at_tpr, pixel_auroc, roc_curve
from anomem.evaluate.report import report
from anomem.evaluate.scoring import Scored, Scorer, fit_scorer, score_images

__all__ = [
    "Scored",
    "Scorer",
    "aupro",
    "auroc",
    "average_precision",
    "baselines",
    "fit_scorer",
    "fpr_at_tpr",
    "patch_pca_maps",
    "pixel_auroc",
    "report",
    "roc_curve",
    "score_images",
]
