"""Tables and picture of docs/RESULTS.md, from benchmarks/results/accuracy.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from anomem.plots.style import AMBER, BLUE, GREEN, ORANGE
from benchmarks.accuracy.settings import DIGITS, OTHER_DIGITS, TEXTURES
from benchmarks.harness import rows
from benchmarks.harness.rows import Score
from benchmarks.report.pictures import BLACK, GREY, figure_of, legend_below, save

ROWS = "accuracy.jsonl"


@dataclass(frozen=True)
class Group:
    """Classes that are averaged."""

    name: str
    dataset: str
    normals: tuple[str, ...]
    anomalies: str
    measure: str
    """"auroc" or "pixel_auroc"."""


GROUPS = (
    Group("digits 3, 8, 9", "digits", DIGITS, "classes", "auroc"),
    Group("digits, all ten", "digits", tuple(sorted((*DIGITS, *OTHER_DIGITS))), "classes", "auroc"),
    Group("textures against photographs", "textures", TEXTURES, "photographs", "auroc"),
    Group("scratches on textures, pixels", "textures", TEXTURES, "scratch", "pixel_auroc"),
)
GOALS = (
    (GROUPS[0], "one-class", "plain", 0.92),
    (GROUPS[0], "one-class", "detector", 0.985),
    (GROUPS[0], "synthetic outliers", "plain", 0.975),
    (GROUPS[0], "synthetic outliers", "stage2", 0.98),
    (GROUPS[0], "outlier exposure", "stage2", 0.985),
    (GROUPS[1], "one-class", "detector", 0.99),
    (GROUPS[2], "one-class", "detector", 0.94),
    (GROUPS[3], "one-class", "detector", 0.75),
)
"""Group, setting, score and the mean to reach."""
# Scores that a reader compares; every variant of the plain deviation is in the rows.
SCORES = (
    "plain", "prior", "energy", "detector", "detector/features", "stage2", "local", "whole", "both", "either",
    "kNN-3", "one-class SVM", "LOF", "isolation forest", "patch PCA",
)  # fmt: skip
# Score -> colour and marker of the picture, and the groups that it shows.
STYLES = {
    "plain": (AMBER, "o"),
    "detector": (BLUE, "D"),
    "detector/features": (GREEN, "^"),
    "stage2": (ORANGE, "s"),
    "kNN-3": (BLACK, "x"),
    "isolation forest": (GREY, "+"),
    "patch PCA": (BLACK, "*"),
}
SHOWN = (GROUPS[0], GROUPS[2], GROUPS[3])
TICKS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
MOST = 0.999
"""Above it a mean is drawn at it: the axis would stretch without end."""


def seeds_of(scores: list[Score], group: Group, setting: str, score: str) -> dict[int, list[float]]:
    """Seed -> numbers of all classes, in the group's order; only seeds that have every class.

    Args:
        scores: of any jobs.
        group: which classes and which measure.
        setting: as in `benchmarks.accuracy.settings.SETTINGS`.
        score: its name.
    """
    found: dict[int, dict[str, float]] = {}
    for row in scores:
        value = getattr(row, group.measure)
        same = (row.dataset, row.anomalies, row.setting, row.score) == (group.dataset, group.anomalies, setting, score)
        if same and row.normal in group.normals and value is not None:
            found.setdefault(row.seed, {})[row.normal] = value
    return {
        seed: [values[normal] for normal in group.normals]
        for seed, values in sorted(found.items())
        if len(values) == len(group.normals)
    }


def group_section(group: Group) -> Callable[[Path], str]:
    """Setting × score -> mean over the classes, seed by seed, and the worst class.

    Args:
        group: which classes and which measure.
    """

    def section(results: Path) -> str:
        scores = rows.read(results / ROWS, Score)
        lines = []
        for setting in dict.fromkeys(row.setting for row in scores):
            for score in SCORES:
                seeds = seeds_of(scores, group, setting, score)
                if not seeds:
                    continue
                means = " / ".join(f"{mean(values):.4f}" for values in seeds.values())
                worst = min(value for values in seeds.values() for value in values)
                lines.append(f"| {setting} | {score} | {means} | {worst:.4f} |")
        if not lines:
            return "Not measured yet."
        return "\n".join(["| setting | score | mean, seed by seed | worst class |", "|---|---|---|---|", *lines])

    return section


def precision(results: Path) -> str:
    """AUROC of bfloat16 less that of float32 on digits, over pairs of the same class and seed."""
    scores = rows.read(results / "precision.jsonl", Score)
    found = {(row.score, row.normal, row.seed, row.setting.removeprefix("one-class, ")): row.auroc for row in scores}
    lines = [
        "| score | classes, seeds | float32 | bfloat16 | mean difference | its standard error |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for score in ("detector", "plain"):
        pairs = {
            (normal, seed): (value, other)
            for (name, normal, seed, setting), value in found.items()
            if (name, setting) == (score, "float32")
            and value is not None
            and (other := found.get((score, normal, seed, "bf16"))) is not None
        }
        if len(pairs) < 2:
            return "Not measured yet."
        whole, half = zip(*pairs.values(), strict=True)
        differences = [b - a for a, b in pairs.values()]
        seeds = {seed: sum(s == seed for _, s in pairs) for _, seed in sorted(pairs, key=lambda pair: pair[1])}
        about = ", ".join(f"seed {seed}: {count}" for seed, count in seeds.items())
        error = stdev(differences) / len(differences) ** 0.5
        lines.append(
            f"| {score} | {about} | {mean(whole):.4f} | {mean(half):.4f} | {mean(differences):+.4f} | {error:.4f} |"
        )
    return "\n".join(lines)


def goals(results: Path) -> str:
    """Aim, measured means, and whether every measured seed reaches the aim."""
    scores = rows.read(results / ROWS, Score)
    lines = ["| classes | setting | score | aim | measured, seed by seed | reached |", "|---|---|---|---|---|---|"]
    for group, setting, score, aim in GOALS:
        means = [mean(values) for values in seeds_of(scores, group, setting, score).values()]
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
    "precision": precision,
}


def draw(results: Path, folder: Path) -> Path | None:
    """One panel for each group of classes; equal lengths of the axis halve the distance to 1.

    Args:
        results: folder of rows.
        folder: of pictures.

    Returns:
        The file that was written, None if there are no rows.
    """
    scores = rows.read(results / ROWS, Score)
    if not scores:
        return None
    settings = list(dict.fromkeys(row.setting for row in scores))
    figure, axes = figure_of(1, len(SHOWN), 4.3 * len(SHOWN), 4.6)
    for plot, group in zip(axes[0], SHOWN, strict=True):
        _panel(plot, group, {s: {score: seeds_of(scores, group, s, score) for score in STYLES} for s in settings})
    legend_below(figure, axes[0], len(STYLES))
    figure.suptitle("mean over the three classes; two marks of a kind are two seeds", fontsize=10)
    path = folder / "accuracy.png"
    save(figure, path)
    return path


def _panel(plot: Any, group: Group, found: dict[str, dict[str, dict[int, list[float]]]]) -> None:
    """Mean over the classes of each seed, a line of scores for each setting that has any."""
    lines = [setting for setting, scores in found.items() if any(scores.values())]
    lowest, highest = 1.0, 0.0
    for height, setting in enumerate(lines):
        for score, seeds in found[setting].items():
            colour, marker = STYLES[score]
            means = [min(mean(values), MOST) for values in seeds.values()]
            lowest, highest = min([lowest, *means]), max([highest, *means])
            fill = {"facecolors": "none"} if marker in "oD^s" else {}
            if means:
                plot.scatter(means, [height] * len(means), marker=marker, color=colour, s=46, label=score, **fill)
    plot.set_xscale("function", functions=(_stretch, _shrink))
    limits = (1 - 1.1 * (1 - lowest), 1 - 0.7 * (1 - highest))
    apart = 0.04 * (_stretch(limits[1]) - _stretch(limits[0]))
    ticks: list[float] = []
    for tick in TICKS:
        if limits[0] <= tick <= limits[1] and (not ticks or _stretch(tick) - _stretch(ticks[-1]) > apart):
            ticks.append(tick)
    plot.set_xticks(ticks, [f"≥ {tick:g}" if tick == MOST else f"{tick:g}" for tick in ticks], rotation=60)
    plot.set_xlim(limits)
    plot.set_yticks(range(len(lines)), lines)
    plot.invert_yaxis()
    plot.grid(True, alpha=0.3)
    plot.set_title(group.name, fontsize=11)
    plot.set_xlabel("pixel AUROC" if group.measure == "pixel_auroc" else "AUROC")


def _stretch(auroc: Any) -> Any:
    import numpy as np

    return -np.log(np.maximum(1 - auroc, 1e-6))


def _shrink(value: Any) -> Any:
    import numpy as np

    return 1 - np.exp(-value)
