"""Figures from plain tensors: each function draws one and writes it whole or not at all."""

from anomem.plots.curves import loss_curves, roc_curves, score_histograms
from anomem.plots.embedding import tsne
from anomem.plots.pictures import extremes, prototypes

__all__ = ["extremes", "loss_curves", "prototypes", "roc_curves", "score_histograms", "tsne"]
