"""Tables of solar cells in docs/RESULTS.md, from benchmarks/results/elpv.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from anomem.data.elpv import TYPES
from benchmarks.accuracy.cells import ROWS, CellRow
from benchmarks.harness import rows

MISSING = "Not measured yet."
DEVIATIONS = 3
"""Half the width of the band around a promised rate, in standard deviations of a binomial."""


class Goal(NamedTuple):
    """What was aimed at: the mean over seeds of one score."""

    kind: str
    setting: str
    score: str
    aim: float


GOALS = (
    Goal("mono", "k-means 1024", "plain", 0.950),
    Goal("mono", "k-means 1024", "local", 0.955),
    Goal("mono", "k-means 1024", "both", 0.955),
    Goal("mono", "5% labelled", "labelled", 0.955),
    Goal("poly", "k-means 1024", "plain", 0.885),
    Goal("poly", "k-means 1024", "local", 0.900),
    Goal("poly", "k-means 1024", "both", 0.900),
    Goal("poly", "5% labelled", "labelled", 0.905),
    Goal("mono", "k-means 1024, 160 px", "local", 0.955),
    Goal("mono", "k-means 1024, 160 px", "both", 0.955),
    Goal("poly", "k-means 1024, 160 px", "local", 0.900),
    Goal("poly", "k-means 1024, 160 px", "both", 0.900),
)
SCORES = ("plain", "local", "both")


def read(results: Path) -> list[CellRow]:
    """The rows, seeds in order and in each the kinds of cells."""
    return sorted(rows.read(results / ROWS, CellRow), key=lambda row: (row.seed, TYPES.index(row.kind)))


def goals(results: Path) -> str:
    """Aims beside what was measured."""
    found = read(results)
    lines = ["| cells | setting | score | aim | mean | seed by seed | reached |", "|---|---|---|---|---|---|---|"]
    for kind, setting, score, aim in GOALS:
        values = [r.auroc for r in found if (r.kind, r.setting, r.score) == (kind, setting, score)]
        if values:
            mean = sum(values) / len(values)
            seeds = " / ".join(f"{value:.4f}" for value in values)
            reached = "yes" if mean >= aim else "no"
            lines.append(f"| {kind} | {setting} | {score} | {aim:.3f} | {mean:.4f} | {seeds} | {reached} |")
    return "\n".join(lines) if len(lines) > 2 else MISSING


SIZES = {128: ("k-means 1024", "rivals")} | {
    side: (f"k-means 1024, {side} px", f"rivals, {side} px") for side in (160, 192)
}
"""Side in pixels -> settings of the filled memory and of the rivals on the same encoder, shown where both have rows."""


def summary(results: Path) -> str:
    """The README's figures: the filled memory beside its rivals, who is ahead, and what the promise came to."""
    found = read(results)
    lines = ["| AUROC, mean of three splits | filled memory | PatchCore | PaDiM |", "|---|---|---|---|"]
    sentences = []
    for kind in TYPES:
        ahead = set()
        for side, (filled, rivals) in SIZES.items():
            ours = {r.seed: r.auroc for r in found if (r.kind, r.setting, r.score) == (kind, filled, "both")}
            patchcore, padim = (best_of(found, kind, rivals, name) for name in ("PatchCore", "PaDiM"))
            if not (ours and ours.keys() == patchcore.keys() == padim.keys()):
                continue
            means = (sum(values.values()) / len(values) for values in (ours, patchcore, padim))
            lines.append(f"| {kind}, {side} pixels | {' | '.join(f'{mean:.3f}' for mean in means)} |")
            ahead |= {"PaDiM is" if padim[seed] > ours[seed] else "the filled memory is" for seed in ours}
        if not ahead:
            return MISSING
        who = ahead.pop() if len(ahead) == 1 else "neither the filled memory nor PaDiM is"
        sentences.append(f"On {kind} {who} ahead on every split.")
    splits = [row for row in found if row.splits is not None and row.alpha == 0.01]
    promised = [row for kind in TYPES for row in splits if row.kind == kind]
    if [row.kind for row in promised] != list(TYPES):
        return MISSING
    alarms = " and ".join(f"{row.false_alarms:.2%} ({row.kind})" for row in promised)
    hits = " and ".join(f"{row.found:.0%}" for row in promised)
    sentences += [
        "Promised: at most 1% of normals are called anomalous.",
        f"Measured on new normals: {alarms}, the mean of a hundred splits with memories of 256 random rows.",
        f"{hits} of the defects were found.",
    ]
    return "\n".join([*lines, "", *sentences])


def best_of(found: Sequence[CellRow], kind: str, setting: str, rival: str) -> dict[int, float]:
    """Seed -> AUROC of a rival, pooled in the way that is better on average."""
    poolings: dict[str, dict[int, float]] = {}
    for row in found:
        if (row.kind, row.setting) == (kind, setting) and row.score.startswith(f"{rival}, "):
            poolings.setdefault(row.score, {})[row.seed] = row.auroc
    return max(poolings.values(), key=lambda values: sum(values.values()) / len(values), default={})


def fills(results: Path) -> str:
    """Ways to fill the memories: bytes, and the mean AUROC over seeds of three scores of both types."""
    found = [row for row in read(results) if row.memory_bytes is not None]
    if not found:
        return MISSING
    columns = [f"{kind} {score}" for kind in TYPES for score in SCORES]
    lines = [f"| memory | KiB mono / poly | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for setting in dict.fromkeys(row.setting for row in found):
        same = [row for row in found if row.setting == setting]
        sizes = [next((r.memory_bytes for r in same if r.kind == kind), None) for kind in TYPES]
        shown = " / ".join("–" if size is None else f"{size / 1024:.0f}" for size in sizes)
        values = [_mean([r for r in same if (r.kind, r.score) == (k, s)]) for k in TYPES for s in SCORES]
        lines.append(f"| {setting} | {shown} | {' | '.join(values)} |")
    return "\n".join(lines)


def _mean(same: Sequence[CellRow]) -> str:
    """The mean, with the number of seeds where it is not three."""
    if not same:
        return "–"
    mean = f"{sum(row.auroc for row in same) / len(same):.4f}"
    return mean if len(same) == 3 else f"{mean} ({len(same)} seed{'s' if len(same) > 1 else ''})"


def others(results: Path) -> str:
    """Rivals, pixels, labels, few normals and training from scratch, seed by seed."""
    found = [row for row in read(results) if row.memory_bytes is None and row.splits is None]
    if not found:
        return MISSING
    lines = ["| setting | score | mono, seed by seed | poly, seed by seed |", "|---|---|---|---|"]
    for setting, score in dict.fromkeys((row.setting, row.score) for row in found):
        cells = []
        for kind in TYPES:
            same = [r for r in found if (r.kind, r.setting, r.score) == (kind, setting, score)]
            cells.append(" / ".join(f"{row.auroc:.4f}" for row in same) or "–")
        lines.append(f"| {setting} | {score} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def verdicts(results: Path) -> str:
    """What the verdict promised and did, split by split."""
    found = [row for row in read(results) if row.alpha is not None and row.splits is None]
    if not found:
        return MISSING
    lines = [
        "| setting | cells | promised | false alarms, seed by seed | defects found, seed by seed | fit, CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for setting, kind in dict.fromkeys((row.setting, row.kind) for row in found):
        same = [row for row in found if (row.setting, row.kind) == (setting, kind)]
        alarms = " / ".join(f"{row.false_alarms:.1%}" for row in same)
        hits = " / ".join(f"{row.found:.0%}" for row in same)
        seconds = " / ".join(f"{row.fit_seconds:.0f}" for row in same)
        promised = f"at most {same[0].alpha:.0%}"
        lines.append(f"| {setting} | {kind} | {promised} | {alarms} | {hits} | {seconds} |")
    return "\n".join(lines)


def splits(results: Path) -> str:
    """False alarms averaged over resampled splits, beside what was promised."""
    found = [row for row in read(results) if row.splits is not None]
    if not found:
        return MISSING
    lines = [
        "| cells | splits | normals | promised | false alarms | band | defects found |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        assert row.alpha is not None
        low, high = band(row)
        lines.append(
            f"| {row.kind} | {row.splits} | {row.normals} | at most {row.alpha:.0%} | "
            f"{row.false_alarms:.2%} | {low:.2%} to {high:.2%} | {row.found:.0%} |"
        )
    return "\n".join(lines)


def band(row: CellRow) -> tuple[float, float]:
    """Rates within `DEVIATIONS` standard deviations of alpha, if each normal were judged once."""
    assert row.alpha is not None
    assert row.normals is not None
    half = DEVIATIONS * math.sqrt(row.alpha * (1 - row.alpha) / row.normals)
    return max(0.0, row.alpha - half), row.alpha + half


SECTIONS: dict[str, Callable[[Path], str]] = {
    "elpv-readme": summary,
    "elpv-goals": goals,
    "elpv-fills": fills,
    "elpv-others": others,
    "elpv-verdicts": verdicts,
    "elpv-splits": splits,
}
