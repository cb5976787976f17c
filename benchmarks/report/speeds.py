"""The README's table: how many times as fast as the fastest other implementation, by operator and machine."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.report import tables

SUITES = ("kernels", "training", "grid")
MACHINES = {**tables.PROCESSORS, "cuda": "GPU"}
"""What the files of rows are of."""
OPERATORS = {
    "retrieval": ("retrieve", "shrink"),
    "NT-Xent": ("nt_xent", "memory_loss"),
    "InfoNCE": ("info_nce",),
    "gather, variance": ("gather", "variance", "sample"),
    "deviation map, diagnostics": ("deviation_map", "usage"),
    "batch norm": ("batch_norm",),
    "3×3 convolutions": ("conv3x3", "downsample"),
    "augmentation": ("augment",),
}
"""The table's lines: operators of rows."""


def quotients(results: Path, device: str) -> dict[str, list[float]]:
    """By operator, of each case the time of the fastest other implementation over that of the library's kernel."""
    found: dict[str, list[float]] = {}
    for suite in SUITES:
        for group in tables.cases_of(tables.load(results, device, suite)):
            own, other = tables.fastest(group), tables.fastest_other(group)
            if own is not None and other is not None:
                found.setdefault(own.operator, []).append(tables.median(other) / tables.median(own))
    return found


def speeds(results: Path) -> str:
    """The table, and the machines under it."""
    measured = {device: quotients(results, device) for device in MACHINES}
    there = {device: name for device, name in MACHINES.items() if measured[device]}
    lines = [f"| operator | {' | '.join(there.values())} |", "|---|" + "--:|" * len(there)]
    for name, operators in OPERATORS.items():
        cells = [_cell([x for operator in operators for x in measured[device].get(operator, [])]) for device in there]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    abouts = {device: tables.load(results, device, "kernels")[0].about for device in there}
    machines = [f"- {there[device]}: {tables.machine_line(about)}" for device, about in abouts.items()]
    if "cuda" not in there:
        machines.append(f"- {tables.NOT_MEASURED['cuda']}")
    return "\n".join([*lines, "", *machines])


def _cell(found: list[float]) -> str:
    if not found:
        return "–"
    if len(found) == 1:
        return tables.times(found[0])
    return f"{tables.times(statistics.median(found))} ({min(found):.2f} to {max(found):.2f})"


SECTIONS = {"speeds": speeds}
