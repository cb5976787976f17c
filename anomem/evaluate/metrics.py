"""AUROC, average precision, FPR at a TPR, pixel AUROC, AUPRO and AUPIMO. A higher score is more anomalous.

Computed on the device of the scores, with ties counted exactly; tests compare them with scikit-learn's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anomem.errors import ArgumentError, optional
from anomem.validation import require


def auroc(scores: Any, is_anomaly: Any) -> float:
    """Area under the ROC curve: the chance that an anomaly scores higher than a normal, ties counting half.

    From the sum of the anomalies' mid-ranks (Mann and Whitney 1947), in float64.

    Args:
        scores: [N] finite numbers.
        is_anomaly: [N] bool.

    Raises:
        ArgumentError: a non-finite score, unequal lengths, or one class only.
    """
    scores, is_anomaly = _checked(scores, is_anomaly)
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    middle = counts.cumsum(0) - (counts - 1) / 2  # mean rank, from 1, of each distinct score
    anomalies = int(is_anomaly.sum())
    normals = len(scores) - anomalies
    wins = float(middle[place[is_anomaly]].sum()) - anomalies * (anomalies + 1) / 2
    return wins / (anomalies * normals)


def roc_curve(scores: Any, is_anomaly: Any) -> tuple[Tensor, Tensor]:
    """The ROC curve, one point per distinct score, from (0, 0) to (1, 1).

    Args:
        scores: [N] finite numbers.
        is_anomaly: [N] bool.

    Returns:
        False-positive rate and true-positive rate, each [K + 1] float64, for thresholds from high to low.

    Raises:
        ArgumentError: as `auroc`.
    """
    hits, false_alarms = _counts(*_checked(scores, is_anomaly))
    start = hits.new_zeros(1)
    return torch.cat([start, false_alarms / false_alarms[-1]]), torch.cat([start, hits / hits[-1]])


def average_precision(scores: Any, is_anomaly: Any) -> float:
    """Σ (R_k − R_{k−1}) P_k over the distinct scores from high to low, precision P and recall R of anomalies.

    Args:
        scores: [N] finite numbers.
        is_anomaly: [N] bool.

    Raises:
        ArgumentError: as `auroc`.
    """
    hits, false_alarms = _counts(*_checked(scores, is_anomaly))
    recall = hits / hits[-1]
    gained = recall.diff(prepend=recall.new_zeros(1))
    return float((gained * hits / (hits + false_alarms)).sum())


def fpr_at_tpr(scores: Any, is_anomaly: Any, tpr: float = 0.95) -> float:
    """Smallest false-positive rate at which the true-positive rate reaches a value.

    Args:
        scores: [N] finite numbers.
        is_anomaly: [N] bool.
        tpr: wanted true-positive rate in (0, 1].

    Raises:
        ArgumentError: as `auroc`, or a rate outside of (0, 1].
    """
    require(0 < tpr <= 1, "tpr", "a rate in (0, 1]", tpr)
    false_positive, true_positive = roc_curve(scores, is_anomaly)
    return float(false_positive[true_positive >= tpr][0])


def pixel_auroc(maps: Any, masks: Any) -> float:
    """AUROC over the pixels of all images together.

    Args:
        maps: [T, H, W] finite numbers, higher is more anomalous.
        masks: [T, H, W] bool, True on anomalous pixels.

    Raises:
        ArgumentError: a non-finite value, unequal shapes, or no anomalous (or no normal) pixel.
    """
    maps, masks = _checked_maps(maps, masks)
    return auroc(maps.flatten(), masks.flatten())


def aupro(maps: Any, masks: Any, limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate (MVTec AD's measure).

    The overlap at a threshold is the detected share of each anomalous region (8-connected pixels of a mask), averaged
    over the regions of all images: a small defect counts as much as a large one. The false-positive rate is the share
    of normal pixels of all images above the threshold (Bergmann et al. 2021).

    Args:
        maps: [T, H, W] finite numbers, higher is more anomalous.
        masks: [T, H, W] bool, True on anomalous pixels.
        limit: largest false-positive rate, in (0, 1]; 0.3 is usual.

    Raises:
        ArgumentError: as `pixel_auroc`, or a limit outside of (0, 1].
        UserError: scikit-image is not installed.
    """
    require(0 < limit <= 1, "limit", "a false-positive rate in (0, 1]", limit)
    maps, masks = _checked_maps(maps, masks)
    region, anomalous = regions(masks).to(maps.device).flatten(), masks.flatten()
    size = region.bincount()
    # Every region has the same weight, divided among its pixels.
    share = torch.where(anomalous, 1 / (size[region].double() * (len(size) - 1)), 0.0)
    order = maps.flatten().argsort(descending=True)
    ranked = maps.flatten()[order]
    last = torch.cat([ranked.diff() != 0, ranked.new_ones(1, dtype=torch.bool)])
    overlap = share[order].cumsum(0)[last]
    false_positive = (~anomalous)[order].double().cumsum(0)[last] / int((~anomalous).sum())
    start = overlap.new_zeros(1)
    overlap, false_positive = torch.cat([start, overlap]), torch.cat([start, false_positive])
    inside = int((false_positive <= limit).sum())
    area = float(torch.trapezoid(overlap[:inside], false_positive[:inside]))
    if inside < len(overlap):  # a straight line to the limit, which lies between two points
        low, high = float(false_positive[inside - 1]), float(false_positive[inside])
        part = (limit - low) / (high - low)
        end = torch.lerp(overlap[inside - 1], overlap[inside], part)
        area += (limit - low) * float(overlap[inside - 1] + end) / 2
    return area / limit


def aupimo(maps: Any, masks: Any, bounds: tuple[float, float] = (1e-5, 1e-4)) -> float:
    """Mean area under the per-image-overlap curve of the anomalous images (AUPIMO, Bertoldo et al. 2024).

    The false-positive rate of a threshold is measured on normal images alone: the mean over them of the share of their
    pixels at or above it. An anomalous image's overlap is the share of its anomalous pixels at or above it. The overlap
    is averaged over the logarithm of the false-positive rate between the bounds; the threshold of a rate is the lowest
    whose false-positive rate does not exceed it. Fewer than 1 / bounds[0] pixels of normal images cannot resolve the
    lower bound: then thresholds above every normal pixel decide.

    Args:
        maps: [T, H, W] finite numbers, higher is more anomalous.
        masks: [T, H, W] bool, True on anomalous pixels; at least one image without any.
        bounds: lowest and highest false-positive rate, 0 < low < high ≤ 1.

    Raises:
        ArgumentError: as `pixel_auroc`, no normal image, or wrong bounds.
    """
    low, high = bounds
    require(0 < low < high <= 1, "bounds", "two rates, 0 < low < high ≤ 1", bounds)
    maps, masks = _checked_maps(maps, masks)
    anomalous = masks.flatten(1).any(dim=1)
    require(not bool(anomalous.all()), "masks", "at least one image without an anomalous pixel", "none")
    normal = maps[~anomalous].flatten().sort(descending=True).values
    # All images have one size: the mean of the images' shares is the share of all pixels. Thresholds are the distinct
    # values of normal pixels, from high to low; a share `rates[k]` of the pixels is at or above the k-th.
    last = torch.cat([normal.diff() != 0, normal.new_ones(1, dtype=torch.bool)])
    values = normal[last]
    rates = (last.nonzero().flatten() + 1).double() / len(normal)
    # Between two rates the threshold lies above the value of the higher one: strictly above counts.
    kept = rates < high
    edges = torch.cat([rates.new_tensor([low]), rates[kept].clamp_min(low), rates.new_tensor([high])]).log()
    widths = edges.diff() / math.log(high / low)  # of no threshold yet, then of each kept one
    above = values[: len(widths)]
    total = 0.0
    for scores, mask in zip(maps[anomalous], masks[anomalous], strict=True):
        found = scores[mask].sort().values
        exceeding = len(found) - torch.searchsorted(found, above, right=True)
        total += float((exceeding.double() / len(found) * widths).sum())
    return min(1.0, total / int(anomalous.sum()))  # the widths add up to 1 but for rounding


def regions(masks: Tensor) -> Tensor:
    """The 8-connected regions of each mask.

    Args:
        masks: [T, H, W] bool.

    Returns:
        [T, H, W] int64 on the CPU: 0 where the mask is False, elsewhere the region's number, from 1 over all images.

    Raises:
        UserError: scikit-image is not installed.
    """
    with optional("the overlap with anomalous regions"):
        from skimage.measure import label

    labels = torch.zeros(masks.shape, dtype=torch.int64)
    regions_before = 0
    for i, mask in enumerate(masks.cpu()):
        if bool(mask.any()):
            of_mask = torch.from_numpy(label(mask.numpy(), connectivity=2)).long()
            labels[i] = torch.where(of_mask > 0, of_mask + regions_before, 0)
            regions_before += int(of_mask.max())
    return labels


def _checked_maps(maps: Any, masks: Any) -> tuple[Tensor, Tensor]:
    maps, masks = torch.as_tensor(maps), torch.as_tensor(masks)
    require(maps.dim() == 3, "maps", "a tensor [T, H, W]", maps)
    require(maps.shape == masks.shape, "masks", lambda: f"the shape of `maps`, {list(maps.shape)}", masks)
    scores, is_anomaly = _checked(maps.flatten(), masks.flatten())
    return scores.view(maps.shape), is_anomaly.view(maps.shape)


def _counts(scores: Tensor, is_anomaly: Tensor) -> tuple[Tensor, Tensor]:
    """Anomalies and normals at or above each distinct score, from high to low: two [K] float64."""
    order = scores.argsort(descending=True)
    ranked, labels = scores[order], is_anomaly[order]
    last = torch.cat([ranked.diff() != 0, ranked.new_ones(1, dtype=torch.bool)])
    hits = labels.double().cumsum(0)[last]
    total = torch.arange(1, len(ranked) + 1, device=ranked.device, dtype=torch.float64)[last]
    return hits, total - hits


def _checked(scores: Any, is_anomaly: Any) -> tuple[Tensor, Tensor]:
    scores, is_anomaly = torch.as_tensor(scores), torch.as_tensor(is_anomaly)
    require(scores.dim() == 1, "scores", "a tensor [N]", scores)
    require(not scores.is_complex(), "scores", "real numbers", scores.dtype)
    require(is_anomaly.shape == scores.shape, "is_anomaly", lambda: f"[{len(scores)}], one per score", is_anomaly)
    require(is_anomaly.dtype == torch.bool, "is_anomaly", "bool", is_anomaly.dtype)
    bad = int((~scores.isfinite()).sum())
    require(bad == 0, "scores", "finite numbers", lambda: f"{bad} of {len(scores)} NaN or infinite")
    anomalies = int(is_anomaly.sum())
    if anomalies in (0, len(scores)):
        raise ArgumentError(
            "is_anomaly",
            "at least one anomaly and one normal",
            f"{anomalies} anomalies among {len(scores)}",
            "the measure is not defined for one class only",
        )
    return scores.double(), is_anomaly.to(scores.device)
