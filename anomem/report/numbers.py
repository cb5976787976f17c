"""The numbers that the page's script computes too, and those that it is given: thresholds, intervals, curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomem.evaluate.metrics import auroc, roc_curve
from anomem.scoring import Calibration
from anomem.validation import require

RESAMPLES = 500
LEVEL = 0.95
POINTS = 300
"""Of a curve, at most."""


class Confusion(NamedTuple):
    """Numbers of images; positive means called anomalous."""

    tp: int
    fp: int
    tn: int
    fn: int


def confusion(scores: Tensor, is_anomaly: Tensor, threshold: float) -> Confusion:
    """What calling every image anomalous whose score [N] is at least the threshold does."""
    called = scores.double() >= threshold
    of_class = (called & is_anomaly, called & ~is_anomaly, ~called & ~is_anomaly, ~called & is_anomaly)
    return Confusion(*(int(x.sum()) for x in of_class))


def alpha_at(calibration: Tensor, threshold: float) -> float:
    """Rate of normals that a threshold calls anomalous: the p-value of a score at it."""
    return (1 + int((calibration.double() >= threshold).sum())) / (len(calibration) + 1)


def start_threshold(
    scores: Tensor, is_anomaly: Tensor, calibration: Calibration | None, by: str, alpha: float
) -> float:
    """Where the page's threshold stands at first.

    Of a calibrated run the verdict's: the least float64 above the calibration score that a verdict must exceed. Else
    the 95th percentile of the normal test images, or of all where none is normal.
    """
    if calibration is not None:
        known = calibration.scores[by].double().sort(descending=True).values
        allowed = math.floor(alpha * (1 + 1e-12) * (len(known) + 1))
        if allowed >= 1:
            return math.nextafter(float(known[allowed - 1]), math.inf)
        return math.nextafter(float(known[0]), math.inf)
    normals = scores[~is_anomaly] if bool((~is_anomaly).any()) else scores
    return float(normals.double().quantile(0.95))


def bootstrap_interval(
    measure: Callable[[Tensor, Tensor], float], scores: Tensor, is_anomaly: Tensor, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a measure over resampled test images; each class is resampled by itself.

    Args:
        measure: scores [N] and labels [N] -> number.
        scores: [N].
        is_anomaly: [N] bool, both classes.
        seed: of the resampling.
    """
    generator = torch.Generator().manual_seed(seed)
    normal, anomalous = (~is_anomaly).nonzero().flatten(), is_anomaly.nonzero().flatten()
    require(len(normal) > 0 and len(anomalous) > 0, "is_anomaly", "both classes", "one")
    found = []
    for _ in range(RESAMPLES):
        rows = torch.cat([c[torch.randint(len(c), (len(c),), generator=generator)] for c in (normal, anomalous)])
        found.append(measure(scores[rows], is_anomaly[rows]))
    values = torch.tensor(found, dtype=torch.float64)
    rest = (1 - LEVEL) / 2
    return float(values.quantile(rest)), float(values.quantile(1 - rest))


def curve(name: str, scores: Tensor, is_anomaly: Tensor, lead: bool, baseline: bool) -> dict[str, Any]:
    """ROC and precision-recall of one score, as the page draws them."""
    false_positive, true_positive = roc_curve(scores, is_anomaly)
    anomalies, normals = int(is_anomaly.sum()), int((~is_anomaly).sum())
    hits, alarms = true_positive * anomalies, false_positive * normals
    precision = torch.where(hits + alarms > 0, hits / (hits + alarms).clamp_min(1), 1.0)
    return {
        "name": name,
        "auroc": auroc(scores, is_anomaly),
        "lead": lead,
        "baseline": baseline,
        "roc": thinned(false_positive, true_positive),
        "pr": thinned(true_positive, precision),
    }


def thinned(x: Tensor, y: Tensor) -> list[list[float]]:
    """At most `POINTS` points of a curve, first and last among them."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), POINTS)).round().long()
    return [[round(float(a), 4), round(float(b), 4)] for a, b in zip(x[rows], y[rows], strict=True)]
