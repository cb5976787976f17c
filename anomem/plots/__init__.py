"""Figures from plain tensors: each function draws one and writes it atomically."""

from anomem.plots.curves import loss_curves, roc_curves, score_histograms, tsne
from anomem.plots.pictures import extremes, prototypes

__all__ = ["extremes", "loss_curves", "prototypes", "roc_curves", "score_histograms", "tsne"]
