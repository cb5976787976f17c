"""Decisions: the promised false-alarm rate is kept on exchangeable scores, and wrong ways of computing it are not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.scoring.decision import Calibration, benjamini_hochberg, hold_out, normals_needed
from anomem.validation import percent

RESAMPLES = 4000


def calibration(n: int, **options: object) -> Calibration:
    return Calibration({"plain": torch.arange(1.0, n + 1)}, **options)  # type: ignore[arg-type]


def test_p_values_by_hand() -> None:
    scores = torch.tensor([0.0, 1.0, 2.5, 4.0, 9.0])
    # of the calibration scores 1, 2, 3, 4 as many are at least as high: 4, 4, 2, 1, 0
    expected = torch.tensor([5, 5, 3, 2, 1], dtype=torch.float64) / 5
    assert torch.equal(calibration(4).p_values("plain", scores), expected)


def test_equal_scores_count_as_at_least_as_high() -> None:
    tied = Calibration({"plain": torch.full((9,), 2.0)})
    assert tied.p_values("plain", torch.tensor([2.0])).item() == 1.0
    assert tied.p_values("plain", torch.tensor([2.0 + 1e-6])).item() == 0.1


def false_alarms(rate: Callable[[Tensor, Tensor], bool]) -> int:
    """Of so many resamples of 99 calibration scores and a new one, all of one heavy-tailed distribution."""
    source = torch.Generator().manual_seed(1)
    scores = torch.randn(RESAMPLES, 100, generator=source, dtype=torch.float64).exp()
    return sum(rate(row[:99], row[99:]) for row in scores)


def band(alpha: float) -> tuple[float, float]:
    """Four standard deviations around what a rate of alpha gives."""
    centre, spread = RESAMPLES * alpha, math.sqrt(RESAMPLES * alpha * (1 - alpha))
    return centre - 4 * spread, centre + 4 * spread


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_false_alarm_rate(alpha: float) -> None:
    # alpha (n + 1) is a whole number: the rate is exactly alpha
    found = false_alarms(lambda c, s: bool(Calibration({"x": c}).anomalous("x", s, alpha)))
    low, high = band(alpha)
    assert low <= found <= high


def test_false_alarm_rate_between_steps_is_lower() -> None:
    found = false_alarms(lambda c, s: bool(Calibration({"x": c}).anomalous("x", s, 0.0199)))
    low, high = band(0.01)  # floor(alpha (n + 1)) / (n + 1)
    assert low <= found <= high


def test_wrong_ways_leave_the_band() -> None:
    _, high = band(0.01)
    # without the image itself among its peers
    assert false_alarms(lambda c, s: int((c >= s).sum()) / 100 <= 0.01) > high
    # mean and three deviations, which is a promise for Gaussians alone
    assert false_alarms(lambda c, s: bool(s > c.mean() + 3 * c.std())) > high
    # calibrated on what was fitted: fitted scores are lower than those of new normals
    assert false_alarms(lambda c, s: bool(Calibration({"x": 0.7 * c}).anomalous("x", s, 0.01))) > high


def test_pixel_threshold_is_the_verdict_on_the_largest_pixel() -> None:
    maxima = torch.randn(150, generator=torch.Generator().manual_seed(0)).double()
    found = Calibration({"x": maxima}, {"x": maxima})
    new = torch.linspace(-4, 4, 4001).double()
    for alpha in (0.01, 0.05, 0.3, 1 / 151):
        assert torch.equal(found.anomalous("x", new, alpha), new > found.pixel_threshold("x", alpha))


def test_threshold_is_where_the_verdict_changes() -> None:
    scores = torch.randn(150, generator=torch.Generator().manual_seed(3)).double()
    found = Calibration({"x": scores})
    new = torch.linspace(-4, 4, 4001).double()
    for alpha in (0.01, 0.05, 0.3):
        assert torch.equal(found.anomalous("x", new, alpha), new > found.threshold("x", alpha))


def test_how_many_normals_an_alpha_needs() -> None:
    assert [normals_needed(a) for a in (0.5, 0.1, 0.05, 0.01, 0.001)] == [1, 9, 19, 99, 999]
    assert normals_needed(0.03) == 33
    for alpha in (0.01, 0.03, 0.07, 0.001):
        n = normals_needed(alpha)
        assert bool(calibration(n).anomalous("plain", torch.tensor([1e9]), alpha))
        if n > 1:
            assert calibration(n - 1).p_values("plain", torch.tensor([1e9])).item() > alpha


def test_too_few_normals_are_told() -> None:
    with pytest.raises(ArgumentError, match=r"alpha.*98 calibration normals allow.*needs 99"):
        calibration(98).anomalous("plain", torch.tensor([1e9]), 0.01)
    with pytest.raises(ArgumentError, match="needs 999"):
        calibration(99, maxima={"plain": torch.arange(99.0)}).pixel_threshold("plain", 0.001)
    assert "cannot promise a false-alarm rate of 1.00%: that takes 99; the least they allow is 20.00%" in calibration(
        4
    ).promise(0.01)
    assert calibration(99).promise(0.01).startswith("at most 1.00% of normal images")
    assert "no proof" in calibration(99, held="cross").promise(0.01)


def test_hold_out_where_there_are_enough() -> None:
    held, folds = hold_out(353, 0.01, seed=3)
    assert held == "split"
    assert len(folds) == 1
    assert len(folds[0].calibrate) == 105
    assert sorted([*folds[0].fit.tolist(), *folds[0].calibrate.tolist()]) == list(range(353))
    again = hold_out(353, 0.01, seed=3)[1][0]
    assert torch.equal(again.calibrate, folds[0].calibrate)
    assert not torch.equal(hold_out(353, 0.01, seed=4)[1][0].calibrate, folds[0].calibrate)


@pytest.mark.parametrize("normals", [2, 3, 7, 120])
def test_cross_fitting_where_there_are_few(normals: int) -> None:
    held, folds = hold_out(normals, 0.01)
    assert held == "cross"
    assert len(folds) == min(5, normals)
    for fit, calibrate in folds:
        assert len(fit) >= 1
        assert sorted([*fit.tolist(), *calibrate.tolist()]) == list(range(normals)), "no normal is in both"
    everyone = sorted(row for _, calibrate in folds for row in calibrate.tolist())
    assert everyone == list(range(normals)), "each normal calibrates once"


def test_one_normal_calibrates_nothing() -> None:
    assert hold_out(1, 0.01) == ("cross", [])
    nobody = Calibration({"x": torch.zeros(0)}, {"x": torch.zeros(0)}, "cross")
    assert nobody.p_values("x", torch.tensor([-1.0, 1e9])).tolist() == [1.0, 1.0]
    assert nobody.promise(0.5).startswith("the only normal image is fitted")
    for ask in (lambda: nobody.anomalous("x", torch.zeros(1), 0.99), lambda: nobody.pixel_threshold("x", 0.99)):
        with pytest.raises(ArgumentError, match=r"alpha.*a detector with calibration normals, received 0\.99"):
            ask()
    with pytest.raises(ArgumentError, match="at least one normal"):
        hold_out(0, 0.01)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_alpha_is_a_rate(alpha: float) -> None:
    for call in (
        lambda: hold_out(10, alpha),
        lambda: calibration(9).anomalous("plain", torch.zeros(1), alpha),
        lambda: calibration(9).promise(alpha),
        lambda: benjamini_hochberg(torch.ones(2), alpha),
    ):
        with pytest.raises(ArgumentError, match="a rate between 0 and 1"):
            call()


def test_wrong_scores_are_told() -> None:
    with pytest.raises(ArgumentError, match="finite"):
        Calibration({"plain": torch.tensor([1.0, math.nan])})
    with pytest.raises(ArgumentError, match="same number"):
        Calibration({"a": torch.ones(3), "b": torch.ones(4)})
    with pytest.raises(ArgumentError, match="same number"):
        Calibration({})
    with pytest.raises(ArgumentError, match="finite"):
        calibration(9).p_values("plain", torch.tensor([math.inf]))
    with pytest.raises(ArgumentError, match=r"a calibrated score: plain.*'detector'"):
        calibration(9).p_values("detector", torch.zeros(1))


def test_benjamini_hochberg_by_hand() -> None:
    # steps of 0.05 · k / 5: .01 .02 .03 .04 .05; the third is the last within its step
    p = torch.tensor([0.9, 0.021, 0.002, 0.029, 0.06])
    assert benjamini_hochberg(p, 0.05).tolist() == [False, True, True, True, False]
    assert benjamini_hochberg(torch.tensor([0.5, 0.6]), 0.05).tolist() == [False, False]
    assert benjamini_hochberg(torch.empty(0), 0.05).tolist() == []


def test_benjamini_hochberg_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    source = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.rand(40, generator=source, dtype=torch.float64).clamp_min(1e-9) ** 3
        expected = torch.from_numpy(stats.false_discovery_control(p.numpy()) <= 0.1)
        assert torch.equal(benjamini_hochberg(p, 0.1), expected)


def test_false_discovery_rate() -> None:
    source = torch.Generator().manual_seed(2)
    shares, uncorrected = [], []
    for _ in range(1000):
        found = Calibration({"x": torch.randn(400, generator=source)})
        scores = torch.cat([torch.randn(80, generator=source), torch.randn(20, generator=source) + 4])
        p = found.p_values("x", scores)
        for called, to in ((benjamini_hochberg(p, 0.1), shares), (p <= 0.1, uncorrected)):
            to.append(float(called[:80].sum()) / max(1, int(called.sum())))
    mean = torch.tensor(shares)
    assert float(mean.mean()) <= 0.1 + 4 * float(mean.std()) / math.sqrt(1000)
    assert float(torch.tensor(uncorrected).mean()) > 0.2, "the test can tell"


def test_survives_being_stored() -> None:
    before = Calibration({"plain": torch.randn(20), "detector": torch.randn(20)}, {"plain": torch.randn(20)}, "cross")
    settings = json.loads(json.dumps(before.settings()))
    after = Calibration.restored({k: v.clone() for k, v in before.tensors().items()}, settings)
    assert after.held == "cross"
    scores = torch.randn(50)
    for name in ("plain", "detector"):
        assert torch.equal(after.p_values(name, scores), before.p_values(name, scores))
    assert after.pixel_threshold("plain", 0.1) == before.pixel_threshold("plain", 0.1)
    with pytest.raises(ArgumentError, match=r"scores.NAME or maxima.NAME"):
        Calibration.restored({"other": torch.ones(3)}, settings)


@pytest.mark.parametrize(
    ("rate", "text"), [(0.01, "1.00%"), (1 / 7, "14.29%"), (0.00123, "0.123%"), (1e-12, "1e-10%"), (0.5, "50.00%")]
)
def test_no_rate_is_printed_as_another(rate: float, text: str) -> None:
    assert percent(rate) == text
    assert text in calibration(3).promise(rate)
