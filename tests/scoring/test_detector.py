"""The one-class detector: Ledoit–Wolf against scikit-learn, distances against the formula."""

from __future__ import annotations

import pytest
import torch

from anomem.errors import ArgumentError
from anomem.scoring import DeviationDetector, Gaussians, MomentSums
from anomem.scoring.detector import kept_features


def sums_of(x: torch.Tensor, *sizes: int) -> MomentSums:
    sums = MomentSums(x.shape[1], x.shape[2])
    for part in x.split(sizes or (len(x),)):
        sums.update(part)
    return sums


@pytest.mark.parametrize(("count", "features"), [(60, 5), (12, 20), (2, 3)])
def test_covariance_and_shrinkage_are_scikit_learns(count: int, features: int) -> None:
    from sklearn.covariance import LedoitWolf

    x = 3 + torch.randn(count, 2, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)
    mean, covariance, shrinkage = sums_of(x).gaussian()
    for p in range(2):
        expected = LedoitWolf().fit(x[:, p].numpy())
        torch.testing.assert_close(mean[p], torch.from_numpy(expected.location_))
        torch.testing.assert_close(covariance[p], torch.from_numpy(expected.covariance_))
        assert float(shrinkage[p]) == pytest.approx(float(expected.shrinkage_))


def test_batches_add_up() -> None:
    x = torch.randn(50, 3, 4)
    for actual, whole in zip(sums_of(x, 20, 29, 1).gaussian(), sums_of(x).gaussian(), strict=True):
        torch.testing.assert_close(actual, whole)


def test_a_far_origin_does_not_cancel() -> None:
    x = torch.randn(200, 1, 4, dtype=torch.float64)
    near, far = sums_of(x).gaussian(), sums_of(x + 1e6).gaussian()
    torch.testing.assert_close(near[1], far[1])
    torch.testing.assert_close(near[2], far[2])


def test_one_image_is_too_few() -> None:
    with pytest.raises(ArgumentError, match="at least two"):
        sums_of(torch.randn(1, 2, 3)).gaussian()


def test_distance_is_mahalanobis() -> None:
    x = torch.randn(40, 2, 3, dtype=torch.float64)
    gaussians = Gaussians(2, 3).double()
    gaussians.fit(sums_of(x))
    mean, covariance, _ = sums_of(x).gaussian()
    centred = x - mean
    expected = torch.einsum("npi,pij,npj->np", centred, torch.linalg.inv(covariance), centred).sqrt()
    torch.testing.assert_close(gaussians(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_constant_features_are_no_obstacle() -> None:
    x = torch.zeros(10, 1, 3)
    gaussians = Gaussians(1, 3)
    gaussians.fit(sums_of(x))
    distance = gaussians(torch.cat([x, x + 1]))
    assert distance.isfinite().all()
    assert (distance[10:] > distance[:10]).all()


@pytest.mark.parametrize("alignment", ["per_position", "pooled"])
def test_detector_finds_the_shifted_images(alignment: str) -> None:
    normal = [torch.randn(80, 4, 3), torch.randn(80, 1, 5)]
    detector = DeviationDetector([4, 1], [3, 5], alignment)  # type: ignore[arg-type]
    detector.fit(lambda: [[x[:50] for x in normal], [x[50:] for x in normal]])
    assert detector(normal).shape == (80,)
    shifted = [x + 3 for x in normal]
    assert detector(shifted).min() > detector(normal).quantile(0.9)
    assert [m.shape for m in detector.maps(shifted)] == [(80, 4), (80, 1)]


def test_each_scale_is_in_units_of_its_training_spread() -> None:
    normal = [torch.randn(200, 2, 3)]
    detector = DeviationDetector([2], [3], "per_position")
    detector.fit(lambda: [normal])
    assert float(detector(normal).std()) == pytest.approx(1, abs=1e-4)


def test_unknown_alignment_is_named() -> None:
    with pytest.raises(ArgumentError, match="per_position"):
        DeviationDetector([1], [2], "aligned")  # type: ignore[arg-type]


@pytest.mark.parametrize("alignment", ["per_position", "pooled"])
def test_two_images_are_in_units_of_their_distance(alignment: str) -> None:
    # Both are equally far from their mean; what rounding leaves of the difference is no unit to measure in.
    images = torch.randn(2, 4, 3)
    detector = DeviationDetector([4], [3], alignment)  # type: ignore[arg-type]
    detector.fit(lambda: [[images]])
    assert detector([images]).tolist() == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("alignment", ["per_position", "pooled"])
def test_identical_images_leave_finite_distances(alignment: str) -> None:
    """Their variance is zero: whatever differs is far away, and not infinitely far."""
    image = torch.randn(1, 4, 3)
    for normal in (image, torch.zeros_like(image)):
        detector = DeviationDetector([4], [3], alignment)  # type: ignore[arg-type]
        detector.fit(lambda normal=normal: [[normal.expand(5, -1, -1)]])  # type: ignore[misc]
        near, far = detector([torch.cat([normal, normal + 100])]).tolist()
        assert near < 1 < 1e6 < far < 1e15


def test_memory_is_bounded_by_fewer_channels() -> None:
    positions, features = [1024, 256], [64, 128]
    numbers = sum(p * d**2 for p, d in zip(positions, features, strict=True))
    kept = kept_features(positions, features, 3)
    assert sum(p * k**2 for p, k in zip(positions, kept, strict=True)) <= 2**18 < numbers
    assert kept_features(positions, features, 3072) == features
    detector = DeviationDetector(positions, features, "per_position", megabytes=3)
    assert sum(buffer.numel() for name, buffer in detector.named_buffers() if "whitening" in name) <= 2**18
    state = detector.state_dict()
    assert state["projection0"].shape == (64, kept[0])
    again = DeviationDetector(positions, features, "per_position", megabytes=3).state_dict()
    assert torch.equal(state["projection1"], again["projection1"])


@pytest.mark.parametrize("megabytes", [1, 1024])
def test_a_projected_detector_finds_the_shifted_images(megabytes: int) -> None:
    normal = [torch.randn(80, 300, 40)]
    detector = DeviationDetector([300], [40], "per_position", megabytes)
    assert detector.projected == (megabytes == 1)
    detector.fit(lambda: [[x[:50] for x in normal], [x[50:] for x in normal]])
    shifted = [normal[0] + 0.5]
    assert detector(shifted).min() > detector(normal).max()
    assert [m.shape for m in detector.maps(shifted)] == [(80, 300)]
    assert [d.shape for d in detector.distances(shifted)] == [(80, 300)]


def test_blocks_of_positions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(30, 7, 5)
    whole, parts = Gaussians(7, 5), Gaussians(7, 5)
    whole.fit(sums_of(x))
    monkeypatch.setattr("anomem.scoring.detector.BLOCK", 60)  # two positions at a time
    parts.fit(sums_of(x))
    torch.testing.assert_close(parts.whitening, whole.whitening)
    torch.testing.assert_close(parts.mean, whole.mean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_deviations_no_covariance_can_be_taken_of(value: float) -> None:
    x = torch.randn(10, 2, 3)
    x[3, 1] = value
    with pytest.raises(ArgumentError, match="`images`: expected deviations of which a covariance can be taken"):
        Gaussians(2, 3).fit(sums_of(x))
