"""Table of docs/EXPORT.md: CPU time of exported runs beside eager ones, from benchmarks/results/cpu-export.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = "cpu-export.jsonl"


def table(results: Path) -> str:
    """Run × format -> CPU time at batch 1 and 32, images a second, and how far it differs from eager."""
    file = results / ROWS
    rows: list[dict[str, Any]] = []
    if file.exists():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not rows:
        return "Not measured yet."
    of = {(row["run"], row["format"], row["batch"]): row for row in rows}
    lines = [
        "| run | format | batch 1: p50, p99 ms | batch 32: p50, p99 ms | images/s at 1, 32 | against eager "
        "| scores, maps differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for run, format in dict.fromkeys((row["run"], row["format"]) for row in rows):
        one, many, eager, eagers = (of[run, f, b] for f in (format, "eager") for b in (1, 32))
        height, width = one["image_size"]
        times = [f"{row['p50']:.2f}, {row['p99']:.2f}" for row in (one, many)]
        rate = f"{one['images_per_second']:.0f}, {many['images_per_second']:.0f}"
        ratio = f"{eager['p50'] / one['p50']:.2f}×, {eagers['p50'] / many['p50']:.2f}×"
        parity = one.get("parity")
        differ = "–" if parity is None else f"{parity['score']:.0e}, {parity['map']:.0e}"
        lines.append(f"| {run} {height}×{width} | {format} | {times[0]} | {times[1]} | {rate} | {ratio} | {differ} |")
    about = rows[0]["about"]
    verdicts = sum(row["parity"]["verdicts"] for row in rows if "parity" in row)
    lines += [
        "",
        f"CPU time of one thread, calls in turns in one process; ratios are eager's median divided by the format's. "
        f"{about['device_name']}, torch {about['torch']}. Verdicts that differ: {verdicts}. Commit {about['commit']}.",
    ]
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Path], str]] = {"export": table}
