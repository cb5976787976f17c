"""Committed rows of solar cells keep what was promised, and the tables say when they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.cells import ROWS, SEEDS, CellRow
from benchmarks.harness import rows
from benchmarks.harness.rows import RESULTS
from benchmarks.report.cells import GOALS, MISSING, band, goals, read, summary


def test_false_alarms_over_splits_are_within_the_binomial_band() -> None:
    found = [row for row in read(RESULTS) if row.splits is not None]
    assert {(row.kind, row.alpha) for row in found} == {(k, a) for k in ("mono", "poly") for a in (0.01, 0.05)}
    for row in found:
        assert row.splits is not None
        assert row.splits >= 100
        low, high = band(row)
        assert row.false_alarms is not None
        assert low <= row.false_alarms <= high, (row.kind, row.alpha)
        assert row.alpha is not None
        assert 2.5 * row.alpha > high, "a rate that is far off would be seen"


def test_every_aim_is_measured_on_every_split() -> None:
    found = read(RESULTS)
    for kind, setting, score, _ in GOALS:
        seeds = [r.seed for r in found if (r.kind, r.setting, r.score) == (kind, setting, score)]
        assert tuple(seeds) == SEEDS, (kind, setting, score)
    assert not any(row.dirty for row in found)


def test_an_aim_that_is_missed_is_called_so(tmp_path: Path) -> None:
    (first, *_) = GOALS
    (row,) = [r for r in read(RESULTS) if (r.kind, r.setting, r.score, r.seed) == (*first[:3], 0)]
    for auroc, reached in ((first.aim, "yes"), (first.aim - 1e-6, "no")):
        rows.append(tmp_path / ROWS, replace(row, auroc=auroc))  # the last row counts
        assert isinstance(row, CellRow)
        assert goals(tmp_path).splitlines()[-1].endswith(f"| {reached} |")


def test_the_readme_says_who_is_ahead_as_the_rows_do(tmp_path: Path) -> None:
    for row in read(RESULTS):
        filled = (row.kind, row.score) == ("poly", "both") and row.setting.startswith("k-means 1024")
        rows.append(tmp_path / ROWS, replace(row, auroc=0.999) if filled else row)
    assert "On poly the filled memory is ahead on every split." in summary(tmp_path)
    assert "| poly, 128 pixels | 0.999 |" in summary(tmp_path)


def test_a_size_without_a_rival_on_every_split_is_left_out(tmp_path: Path) -> None:
    for row in read(RESULTS):
        if (row.setting, row.seed) != ("rivals", 2):
            rows.append(tmp_path / ROWS, row)
    assert "128 pixels" not in summary(tmp_path)
    assert "192 pixels" in summary(tmp_path)
    assert summary(tmp_path / "nowhere") == MISSING
