"""Rows for tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.case import Case
from benchmarks.rows import Row

OURS = ("native", "triton")


def load(results: Path, device: str, suite: str) -> list[Row]:
    """Rows of the working tree's revision; for a case and an implementation the last row counts."""
    found = [row for row in rows.read(results / f"{device}-{suite}.jsonl") if row.revision == "work"]
    return list({(case_of(row), row.implementation): row for row in found}.values())


def load_training(results: Path, device: str) -> list[dict[str, Any]]:
    """Rows of `benchmarks.profile_training`, one for each pipeline."""
    path = results / f"{device}-steps.jsonl"
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({row["pipeline"]: row for row in found}.values())


def case_of(row: Row) -> Case:
    """The case that a row measures."""
    return Case(row.operator, tuple(row.shape.items()), row.dtype, row.training, row.group)


def cases_of(measured: Iterable[Row]) -> list[list[Row]]:
    """Rows grouped by case, in the order in which they were measured."""
    groups: dict[Case, list[Row]] = {}
    for row in measured:
        groups.setdefault(case_of(row), []).append(row)
    return list(groups.values())


def best_of_others(group: list[Row], *, but: str = "eager") -> Row | None:
    """The fastest rival of a case that is neither eager nor the library, nor another one of its own column."""
    others = [row for row in group if row.milliseconds and row.implementation not in (*OURS, "eager", but)]
    return min(others, key=lambda row: row.milliseconds["p50"] if row.milliseconds else 0.0, default=None)
