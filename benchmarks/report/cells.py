"""Tables of solar cells in docs/RESULTS.md, from benchmarks/results/elpv.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from anomem.data.elpv import TYPES
from benchmarks.accuracy.cells import ROWS, CellRow
from benchmarks.harness import rows

MISSING = "Not measured yet."


def scores(results: Path) -> str:
    """Setting × score -> AUROC of both types, seed by seed."""
    found = rows.read(results / ROWS, CellRow)
    if not found:
        return MISSING
    lines = ["| setting | score | mono, seed by seed | poly, seed by seed |", "|---|---|---|---|"]
    for setting, score in dict.fromkeys((row.setting, row.score) for row in found):
        cells = []
        for kind in TYPES:
            same = [r for r in found if (r.kind, r.setting, r.score) == (kind, setting, score)]
            cells.append(" / ".join(f"{row.auroc:.3f}" for row in sorted(same, key=lambda row: row.seed)) or "–")
        lines.append(f"| {setting} | {score} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def verdicts(results: Path) -> str:
    """What the verdict promised and did, split by split."""
    found = [row for row in rows.read(results / ROWS, CellRow) if row.alpha is not None]
    if not found:
        return MISSING
    lines = [
        "| setting | cells | promised | false alarms, seed by seed | defects found, seed by seed | fit, CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for setting, kind in dict.fromkeys((row.setting, row.kind) for row in found):
        same = sorted((r for r in found if (r.setting, r.kind) == (setting, kind)), key=lambda row: row.seed)
        alarms = " / ".join(f"{row.false_alarms:.1%}" for row in same)
        hits = " / ".join(f"{row.found:.0%}" for row in same)
        seconds = " / ".join(f"{row.fit_seconds:.0f}" for row in same)
        lines.append(f"| {setting} | {kind} | at most {same[0].alpha:.0%} | {alarms} | {hits} | {seconds} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Path], str]] = {"elpv-scores": scores, "elpv-verdicts": verdicts}
