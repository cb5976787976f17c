"""Measures, baselines, controls and the report of a run."""

from anomem.evaluate.baselines import baselines, patch_pca_maps
from anomem.evaluate.metrics import aupimo, aupro, auroc, average_precision, fpr_at_tpr, pixel_auroc, roc_curve
from anomem.evaluate.report import control, report

__all__ = [
    "aupimo",
    "aupro",
    "auroc",
    "average_precision",
    "baselines",
    "control",
    "fpr_at_tpr",
    "patch_pca_maps",
    "pixel_auroc",
    "report",
    "roc_curve",
]
