"""The measures against scikit-learn's and by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from sklearn import metrics as sk
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.evaluate import aupimo, aupro, auroc, average_precision, fpr_at_tpr, pixel_auroc, roc_curve
from anomem.testing import assert_within_budget, draw


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    labels = torch.rand(500, generator=torch.Generator().manual_seed(1)) < 0.3
    scores = draw(500, dtype=torch.float64) + labels
    return {
        "no ties": (scores, labels),
        "many ties": (scores.round(), labels),
        "all equal": (torch.zeros(500, dtype=torch.float64), labels),
        "float32": (scores.float(), labels),
        "bfloat16": (scores.bfloat16(), labels),
        "two": (torch.tensor([0.0, 1.0]), torch.tensor([False, True])),
        "rare": (scores, torch.arange(500) == 77),
        "huge": (scores * 1e300, labels),
    }


@pytest.mark.parametrize("name", cases())
def test_equal_to_scikit_learn(name: str) -> None:
    scores, labels = cases()[name]
    plain, truth = scores.double().numpy(), labels.numpy()
    expected = [sk.roc_auc_score(truth, plain), sk.average_precision_score(truth, plain)]
    false_positive, true_positive, _ = sk.roc_curve(truth, plain, drop_intermediate=False)
    expected.append(false_positive[true_positive >= 0.95][0])
    ours = [auroc(scores, labels), average_precision(scores, labels), fpr_at_tpr(scores, labels)]
    exact = torch.tensor(expected, dtype=torch.float64)
    # The average precision is a sum of N terms, rounded as often.
    assert_within_budget(torch.tensor(ours, dtype=torch.float64), exact, exact, name, ulps=len(scores))
    for points, other in zip(roc_curve(scores, labels), (false_positive, true_positive), strict=True):
        curve = torch.from_numpy(other)
        assert_within_budget(points, curve, curve, name)


def test_by_hand() -> None:
    scores, labels = torch.tensor([1.0, 2, 2, 3]), torch.tensor([False, True, False, True])
    assert auroc(scores, labels) == 3.5 / 4  # of four pairs three are right and one is a tie
    assert average_precision(scores, labels) == 0.5 * 1 + 0.5 * 2 / 3
    assert fpr_at_tpr(scores, labels) == 0.5
    assert fpr_at_tpr(scores, labels, 0.5) == 0.0


def test_the_sign_matters() -> None:
    scores, labels = cases()["no ties"]
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels))
    assert auroc(scores, ~labels) == pytest.approx(1 - auroc(scores, labels))
    assert auroc(scores, labels) > 0.7


def test_order_and_scale_do_not() -> None:
    scores, labels = cases()["many ties"]
    order = torch.randperm(500)
    assert auroc(scores[order], labels[order]) == auroc(scores, labels)
    assert auroc(2 * scores - 5, labels) == auroc(scores, labels)


def test_pixels_of_all_images_together() -> None:
    maps, masks = draw(3, 4, 5), draw(3, 4, 5, seed=1) > 1
    assert pixel_auroc(maps, masks) == auroc(maps.flatten(), masks.flatten())
    with pytest.raises(
        ArgumentError, match=r"`masks`: expected the shape of `maps`, \[3, 4, 5\], received shape \[3, 4"
    ):
        pixel_auroc(maps, masks[..., :4])


@pytest.mark.parametrize("measure", [auroc, average_precision, fpr_at_tpr, roc_curve])
def test_bad_input(measure: Callable[..., object]) -> None:
    labels = torch.tensor([True, False, True])
    with pytest.raises(
        ArgumentError, match="expected at least one anomaly and one normal, received 0 anomalies among 3"
    ):
        measure(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="received 3 anomalies among 3; the measure is not defined for one class"):
        measure(torch.zeros(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="`scores`: expected finite numbers, received 1 of 3 NaN or infinite"):
        measure(torch.tensor([0, float("nan"), 1]), labels)
    with pytest.raises(ArgumentError, match=r"`is_anomaly`: expected \[3\], one per score, received shape \[2\]"):
        measure(torch.zeros(3), labels[:2])
    with pytest.raises(ArgumentError, match=r"`is_anomaly`: expected bool, received torch\.int64"):
        measure(torch.zeros(3), labels.long())


def test_rate_out_of_range() -> None:
    with pytest.raises(ArgumentError, match=r"`tpr`: expected a rate in \(0, 1\], received 0"):
        fpr_at_tpr(*cases()["two"], tpr=0)


def overlap_by_thresholds(maps: Tensor, masks: Tensor, limit: float) -> float:
    """The measure as it is defined: every threshold, every region one by one."""
    pairs = zip(masks.numpy(), maps.numpy(), strict=True)
    found = [(label(mask, np.ones((3, 3)))[0], scores) for mask, scores in pairs]
    regions = [scores[labels == i] for labels, scores in found for i in range(1, labels.max() + 1)]
    normal = maps[~masks].numpy()
    thresholds = maps.unique().flip(0).numpy()
    rate = np.array([0.0, *((normal >= t).mean() for t in thresholds)])
    overlap = np.array([0.0, *(np.mean([(region >= t).mean() for region in regions]) for t in thresholds)])
    inside = rate <= limit
    x, y = np.append(rate[inside], limit), np.append(overlap[inside], np.interp(limit, rate, overlap))
    return float(torch.trapezoid(torch.from_numpy(y), torch.from_numpy(x)) / limit)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_overlap_with_regions_by_thresholds(limit: float) -> None:
    masks = torch.rand(4, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.93
    masks[0] = False  # a normal image
    maps = ((draw(4, 20, 30, dtype=torch.float64) + masks) * 5).round()  # many ties
    expected = torch.tensor(overlap_by_thresholds(maps, masks, limit), dtype=torch.float64)
    assert_within_budget(
        torch.tensor(aupro(maps, masks, limit), dtype=torch.float64), expected, expected, "aupro", ulps=maps.numel()
    )


def test_small_regions_count_as_much_as_large_ones() -> None:
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, 0, 0] = True
    masks[0, 4:8, 4:8] = True
    masks[0, 8, 8] = True  # touches at a corner: part of the large one
    large = masks.clone()
    large[0, 0, 0] = False
    assert aupro(masks.double(), masks) == 1
    # The large region is found before anything else, the small one with the rest, at a rate beyond the limit.
    assert aupro(large.double(), masks) == pytest.approx(0.5 + 0.5 * 0.3 / 2)
    assert pixel_auroc(large.double(), masks) > 0.97
    with pytest.raises(ArgumentError, match=r"`limit`: expected a false-positive rate in \(0, 1\], received 0"):
        aupro(masks.double(), masks, 0)


def per_image_overlap_on_a_grid(maps: Tensor, masks: Tensor, low: float, high: float, points: int) -> float:
    """AUPIMO as it is defined: at every rate of a fine logarithmic grid the lowest threshold that keeps it."""
    images = list(zip(maps.numpy(), masks.numpy(), strict=True))
    normal = [scores for scores, mask in images if not mask.any()]
    # A threshold just above each value stands for all thresholds up to the next one.
    thresholds = np.nextafter(np.unique(np.concatenate([scores.ravel() for scores in normal])), np.inf)
    rates = np.array([np.mean([(scores >= t).mean() for scores in normal]) for t in thresholds])
    total = []
    for rate in np.exp(np.log(low) + (np.arange(points) + 0.5) / points * np.log(high / low)):
        threshold = thresholds[rates <= rate].min()
        total.append(np.mean([(scores[mask] >= threshold).mean() for scores, mask in images if mask.any()]))
    return float(np.mean(total))


@pytest.mark.parametrize("bounds", [(1e-5, 1e-4), (1e-3, 1e-2), (0.01, 0.5), (0.2, 1.0)])
def test_per_image_overlap_on_a_grid(bounds: tuple[float, float]) -> None:
    masks = torch.rand(6, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.9
    masks[:3] = False
    maps = ((draw(6, 20, 30, dtype=torch.float64) + 2 * masks) * 20).round() / 20  # ties
    expected = per_image_overlap_on_a_grid(maps, masks, *bounds, points=2000)
    assert aupimo(maps, masks, bounds) == pytest.approx(expected, abs=2e-3)
    assert 0 < expected < 1


def test_per_image_overlap_by_hand() -> None:
    normal = torch.arange(100.0).view(1, 10, 10)  # false-positive rate .01 at 99, .02 at 98, …
    anomalous = torch.full((2, 10, 10), -1.0)
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[1:, 0, :2] = True
    anomalous[:, 0, 0], anomalous[0, 0, 1], anomalous[1, 0, 1] = 1000.0, 98.5, 96.5
    maps = torch.cat([normal, anomalous])
    # Below a rate of .01 the threshold lies above 99: half of each region. From .01 to .02 it lies above 98, so 98.5 is
    # found; 96.5 only from .03 on.
    decade = np.log(0.1 / 0.001)
    first = (np.log(0.01 / 0.001) * 0.5 + np.log(0.1 / 0.01)) / decade
    second = (np.log(0.03 / 0.001) * 0.5 + np.log(0.1 / 0.03)) / decade
    assert aupimo(maps, masks, (0.001, 0.1)) == pytest.approx((first + second) / 2)
    # A large image's false alarms in one image of many normals: only normal images count.
    louder = maps.clone()
    louder[1][~masks[1]] = 5000.0
    assert aupimo(louder, masks, (0.001, 0.1)) == aupimo(maps, masks, (0.001, 0.1))
    assert aupimo(masks.double(), masks) == 1
    assert aupimo(-masks.double(), masks) == 0


def test_per_image_overlap_needs_normal_images() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[:, 0] = True
    with pytest.raises(ArgumentError, match="`masks`: expected at least one image without an anomalous pixel"):
        aupimo(masks.double(), masks)
    with pytest.raises(ArgumentError, match=r"`bounds`: expected two rates, 0 < low < high ≤ 1"):
        aupimo(masks.double(), masks, (0.1, 0.1))
