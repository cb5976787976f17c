"""The tables of docs/RESULTS.md, from benchmarks/results/accuracy.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.accuracy.rows import read
from benchmarks.accuracy.tables import GOALS, GROUPS, Group, seeds_of

# Scores that a reader compares; every variant of the plain deviation is in the rows.
SCORES = (
    "plain", "prior", "energy", "detector", "detector/features", "stage2",
    "kNN-3", "one-class SVM", "LOF", "isolation forest", "patch PCA",
)  # fmt: skip
NOT_MEASURED = "Not measured yet."


def group_section(group: Group) -> Callable[[Path], str]:
    """Setting × score -> mean over the classes, seed by seed, and the worst class.

    Args:
        group: which classes and which measure.
    """

    def section(results: Path) -> str:
        rows = read(results / "accuracy.jsonl")
        settings = list(dict.fromkeys(row.setting for row in rows))
        lines = []
        for setting in settings:
            for score in SCORES:
                seeds = seeds_of(rows, group, setting, score)
                if not seeds:
                    continue
                means = " / ".join(f"{mean(values):.4f}" for _, values in sorted(seeds.items()))
                worst = min(value for values in seeds.values() for value in values)
                lines.append(f"| {setting} | {score} | {means} | {worst:.4f} |")
        if not lines:
            return NOT_MEASURED
        return "\n".join(["| setting | score | mean, seed by seed | worst class |", "|---|---|---|---|", *lines])

    return section


def goals(results: Path) -> str:
    """What was aimed at, what was measured, and whether every measured seed reaches it."""
    rows = read(results / "accuracy.jsonl")
    lines = ["| classes | setting | score | aim | measured, seed by seed | reached |", "|---|---|---|---|---|---|"]
    for group, setting, score, aim in GOALS:
        seeds = seeds_of(rows, group, setting, score)
        means = [mean(values) for _, values in sorted(seeds.items())]
        reached = "not measured" if not means else "yes" if min(means) >= aim else "no"
        shown = " / ".join(f"{value:.4f}" for value in means) or "–"
        lines.append(f"| {group.name} | {setting} | {score} | {aim} | {shown} | {reached} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Path], str]] = {
    "accuracy-goals": goals,
    "accuracy-digits": group_section(GROUPS[0]),
    "accuracy-ten": group_section(GROUPS[1]),
    "accuracy-textures": group_section(GROUPS[2]),
    "accuracy-scratches": group_section(GROUPS[3]),
}
