"""Filling and reading memories beside rivals: wrong numbers are not timed, and the table says what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import memories, scoring
from benchmarks.harness import rows
from benchmarks.memories import MemoryRow
from benchmarks.report import memories as report
from benchmarks.scoring import ScoringRow


def row(implementation: str, milliseconds: float) -> MemoryRow:
    times = {"p20": milliseconds, "p50": milliseconds, "p80": milliseconds}
    return MemoryRow(
        "nearest", 4096, 1024, 40, 1, implementation, times, 3, 1.0, 0, "1.0", "0123", False, "2.14", "a processor", 1
    )


def test_wrong_numbers_are_found() -> None:
    exact = (torch.ones(4000, 3, dtype=torch.float64),)
    right = torch.ones(4000, 3)
    assert memories.wrong((right,), exact, 1e-4) is None
    assert memories.wrong((right * 1.001,), exact, 1e-4) is not None
    assert memories.wrong((right[:-1],), exact, 1e-4) is not None
    exchanged = right.clone()
    exchanged[:3] = 0.5
    assert memories.wrong((exchanged,), exact, 1e-4) is None, "the last of the k nearest may be another"
    exchanged[:5] = 0.5
    assert memories.wrong((exchanged,), exact, 1e-4) is not None
    assert memories.wrong((right * torch.nan,), exact, 1e-4) is not None


def test_table_of_rows(tmp_path: Path) -> None:
    assert report.memories(tmp_path) == report.MISSING
    old, new = row("native", 9.0), row("native", 2.0)
    rows.append(tmp_path / memories.ROWS, old, row("PyTorch", 6.0), row("faiss", 4.0), new)
    assert "| 4,096, 1,024, 40 | 2 | 6 | – | 4 | – | 2.00× |" in report.memories(tmp_path)


def scoring_row(what: str, milliseconds: float, prototypes: int = 1024) -> ScoringRow:
    times = {"p20": 1.0, "p50": milliseconds, "p80": 900.0}
    return ScoringRow(prototypes, what, 128, 64, times, 3, "0123", False, "2.14", "a processor", 1)


def test_table_of_scoring(tmp_path: Path) -> None:
    assert report.scoring(tmp_path) == report.MISSING
    old = scoring_row("detector", 900.0)
    rows.append(tmp_path / scoring.ROWS, old, scoring_row("encoder", 320.0), scoring_row("detector", 400.0))
    rows.append(tmp_path / scoring.ROWS, scoring_row("detector", 400.0, 77))  # without its encoder
    table = report.scoring(tmp_path)
    assert "| 1,024 | 128, 64 | 200 | 160 | 80.0% | 95% |" in table
    assert "77" not in table


def test_encoder_and_detector_take_turns() -> None:
    calls: list[str] = []

    class Encoder:
        def __call__(self, images: torch.Tensor) -> None:
            calls.append("encoder")

    class Detector:
        model = Encoder()

        def __call__(self, images: torch.Tensor) -> None:
            calls.append("detector")

    turns = scoring.in_turns(Detector(), torch.zeros(2, 1, 4, 4), 3)  # type: ignore[arg-type]
    assert calls == ["encoder", "detector"] * 4, "one warm-up each, then three turns"
    assert [(turn.what, len(turn.seconds)) for turn in turns] == [("encoder", 3), ("detector", 3)]


@pytest.mark.parametrize("what", ["nearest", "read", "coreset"])
def test_every_implementation_of_a_case_is_right(what: memories.What) -> None:
    for name in ("faiss", "sklearn"):
        pytest.importorskip(name)
    options = memories.Options(features=(24,), prototypes=(128,), small=True)
    for sizes in memories.cases(what, options):
        contestants = memories.prepared(memories.CASES[what](*sizes), what, sizes)
        assert {"native", "PyTorch", "faiss"} <= {one.name for one in contestants}
        assert all(one.once() >= 0 for one in contestants)
