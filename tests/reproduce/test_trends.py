"""Trends in words on planted rows: what holds, what does not, what cannot be told; and the table around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anomem.reproduce import EXPERIMENTS
from anomem.reproduce.tables import markdown
from anomem.reproduce.trends import Values, difference, ordered


def row(setting: str, normal: str, seed: int, score: str, value: float, **metrics: Any) -> dict[str, Any]:
    """A row of a sweep."""
    return {
        "setting": setting, "normal": normal, "seed": seed, "class": f"class {normal}", "train_images": 10,
        "metrics": {score: {"auroc": value}, **metrics}, "seconds": 1.0, "cpu_seconds": 1.0, "threads": 1,
        "precision": "float32",
    }  # fmt: skip


def rows_of(score: str, **means: float) -> list[dict[str, Any]]:
    """Two classes and two seeds around each mean, with differences of ±0.001 between settings."""
    return [
        row(setting, normal, seed, score, mean + 0.1 * (normal == "4") + 0.001 * ((seed + i) % 2))
        for i, (setting, mean) in enumerate(means.items())
        for normal in ("3", "4")
        for seed in (0, 1)
    ]


def test_differences_are_paired() -> None:
    gap = difference({"a": 0.9, "b": 0.5, "c": 0.7}, {"a": 0.8, "b": 0.4, "d": 0.0})
    assert (gap.mean, gap.pairs) == (pytest.approx(0.1), 2)
    assert gap.error == pytest.approx(0, abs=1e-12)
    assert gap.verdict is None
    assert difference({0: 1.0, 1: 1.1, 2: 0.9}, dict.fromkeys(range(3), 0.0)).verdict == 1
    assert difference({0: 1.0, 1: -1.1, 2: 0.2}, dict.fromkeys(range(3), 0.0)).verdict == 0
    three = difference({0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), 0.0))
    assert 2 < three.mean / three.error < 4
    assert three.verdict == 0, "the interval of three pairs is 4.3 standard errors wide"
    assert difference(dict(enumerate([1.0, 2.0, 3.0] * 4)), dict.fromkeys(range(12), 0.0)).verdict == 1


@pytest.mark.parametrize(
    ("exponential", "said"),
    [(0.8, "Expected and found"), (0.6, "Disagrees"), (0.7, "Cannot be told: ")],
)
def test_table7_says_whether_the_trend_holds(exponential: float, said: str) -> None:
    values = Values(rows_of("plain", linear=0.7, exponential=exponential))
    (sentence,) = EXPERIMENTS["table7"].trend(values)
    assert sentence.startswith(said)
    few = Values([r for r in values.rows if r["normal"] == "3"])
    (sentence,) = EXPERIMENTS["table7"].trend(few)
    assert sentence.startswith("Cannot be told from so few cells")


def test_table6_says_whether_the_weight_matters() -> None:
    names = [name for name in EXPERIMENTS["table6"].settings if name != "untrained"]
    flat = rows_of("linear", **dict.fromkeys(names, 0.9))
    (sentence,) = EXPERIMENTS["table6"].trend(Values(flat))
    assert sentence.startswith("Expected and found: no sensitivity")
    steep = rows_of("linear", **{name: 0.9 - 0.1 * i for i, name in enumerate(names)})
    (sentence,) = EXPERIMENTS["table6"].trend(Values(steep))
    assert sentence.startswith("Disagrees: lambda_V matters here; the best (lambda_V = 0.1)")


def test_margins_are_compared_with_the_papers() -> None:
    rows = []
    for i in range(4):
        fixed = {"M = 1": 0.5, "M = 1.5": 0.7 + 0.01 * (-1) ** i, "M = 2": 0.7, "M = 4": 0.6, "M = 8": 0.5}
        metrics = {name: {"auroc": value} for name, value in fixed.items()}
        rows.append(row("5% labelled", "3", i, "adaptive", 0.8, **metrics))
    (sentence,) = EXPERIMENTS["margin"].trend(Values(rows))
    assert "M = 2 is above M = 1 (" in sentence
    assert "is not told apart from M = 1.5 (" in sentence
    assert "is below adaptive (" in sentence


def test_settings_without_a_claim_are_compared_with_the_first() -> None:
    values = Values(rows_of("plain", default=0.8, untrained=0.7, other=0.9))
    first, second = ordered(("default", "untrained"), "plain", others=("default", "other"))(values)
    assert first.startswith("Expected and found: default is above untrained")
    assert second.startswith("other: above default")


def test_the_papers_figures_stand_beside_ours_where_the_data_are_the_papers(tmp_path: Path) -> None:
    header = {"experiment": "table7", "data": "cifar10", "scale": {"epochs": 1}, "commit": "abc", "command": "anomem x"}
    header |= {"torch": "2", "processor": "cpu", "cells": 12}
    content = "".join(json.dumps(r) + "\n" for r in rows_of("plain", linear=0.7, exponential=0.8))
    (tmp_path / "rows.jsonl").write_text(content)
    (tmp_path / "sweep.json").write_text(json.dumps(header))
    table = markdown(tmp_path)
    assert "| exponential | 85.05 ± 0.07 | 91.50 |" in table  # mean of .8 and .9, ± the seeds' half of .1%
    assert "**Not complete: 8 of 12 cells.**" in table
    assert "scaled down: epochs 1" in table
    assert "| setting | class 3 | class 4 | mean |" in table
    (tmp_path / "sweep.json").write_text(json.dumps({**header, "data": "digits"}))
    table = markdown(tmp_path)
    assert "91.50" not in table
    assert "The paper's figures are of cifar10 and cifar100; only the trend can be compared here." in table


def test_the_papers_figures_are_the_papers() -> None:
    assert list(EXPERIMENTS["table6"].paper["cifar10"].values()) == [91.90, 91.91, 91.87, 91.86]
    for data, linear, exponential in (("cifar10", 91.2, 91.5), ("cifar100", 85.6, 86.1)):
        assert EXPERIMENTS["table7"].paper[data] == {"linear": linear, "exponential": exponential}
