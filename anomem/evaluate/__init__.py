"""Measures, baselines and scores of a task."""

from anomem.evaluate.baselines import baselines, patch_pca_maps
from anomem.evaluate.metrics import auroc, average_precision, fpr_at_tpr, pixel_auroc, roc_curve

__all__ = [
    "auroc",
    "average_precision",
    "baselines",
    "fpr_at_tpr",
    "patch_pca_maps",
    "pixel_auroc",
    "roc_curve",
]
