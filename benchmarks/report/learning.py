"""Tables and picture of what learning is worth, from benchmarks/results/learning.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from anomem.data.elpv import TYPES
from anomem.plots.style import BLUE, GREEN
from benchmarks.accuracy.learning import ROWS, SCRATCH, SEEDS, LearningRow, Part
from benchmarks.harness import rows
from benchmarks.report.pictures import GREY, figure_of, legend_below, save

MISSING = "Not measured yet."
PLAIN, FILLED = "plain", "filled: k-means"
STYLES = {
    "trained": (BLUE, "o"),
    "learned": (BLUE, "o"),
    "trained, filled": (GREEN, "^"),
    "filled": (GREEN, "^"),
    "untrained, filled": (GREY, "s"),
    "untrained": (GREY, "s"),
}
"""Setting -> colour and marker."""
LINES = {PLAIN: "-", "local": "--", "whole": "--"}
"""Score -> line: the plain deviation, and the detector of aligned or of other images."""


def read(results: Path) -> list[LearningRow]:
    """The rows, seeds in order."""
    return sorted(rows.read(results / ROWS, LearningRow), key=lambda row: row.seed)


def detector_of(dataset: str) -> str:
    """The Gaussians' score: of positions where they are aligned, of whole images else."""
    return "local" if dataset == "elpv" else "whole"


def recipes(results: Path) -> str:
    """Every recipe on seed 0, and how far it is from k-means, the mean over both types."""
    found = [row for row in read(results) if row.part == "recipes" and row.seed == SEEDS[0]]
    values = {(row.setting, row.normal): row for row in found}
    filled = [values.get((FILLED, kind)) for kind in TYPES]
    if not found or None in filled:
        return MISSING
    lines = [
        "| recipe | KiB | steps | CPU s | mono plain | poly plain | mean − k-means |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.setting for row in found):
        same = [values[name, kind] for kind in TYPES if (name, kind) in values]
        if len(same) < len(TYPES):
            continue
        gain = mean(row.auroc for row in same) - mean(row.auroc for row in filled if row is not None)
        seconds = mean(row.seconds for row in same)
        scores = " | ".join(f"{row.auroc:.4f}" for row in same)
        lines.append(
            f"| {name} | {same[0].memory_bytes / 1024:.0f} | {same[0].steps} | {seconds:.1f} | {scores} | {gain:+.4f} |"
        )
    return "\n".join(lines)


def sizes(results: Path) -> str:
    """Learned against filled memories of each size, seed by seed, and in how many splits they are ahead."""
    found = [row for row in read(results) if row.part in ("frozen", "sizes")]
    last = max((row.steps for row in found), default=0)
    found = [row for row in found if row.setting == "filled" or row.steps == last]
    lines = [
        "| cells | M | KiB | score | filled, seed by seed | learned, seed by seed | mean difference | ahead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sorted({row.prototypes[0] for row in found}):
        for kind in TYPES:
            for score in (PLAIN, "local", "both"):
                pair = []
                for setting in ("filled", "learned"):
                    same = [
                        row
                        for row in found
                        if (row.prototypes[0], row.normal, row.score, row.setting) == (size, kind, score, setting)
                    ]
                    pair.append({row.seed: row for row in same})
                seeds = [seed for seed in pair[0] if seed in pair[1]]
                if not seeds:
                    continue
                one, two = ([of[seed].auroc for seed in seeds] for of in pair)
                ahead = sum(b > a for a, b in zip(one, two, strict=True))
                shown = " | ".join(" / ".join(f"{value:.4f}" for value in values) for values in (one, two))
                size_kib = pair[1][seeds[0]].memory_bytes / 1024
                lines.append(
                    f"| {kind} | {size} | {size_kib:.0f} | {score} | {shown} | {mean(two) - mean(one):+.4f} "
                    f"| {ahead} of {len(seeds)} |"
                )
    return "\n".join(lines) if len(lines) > 2 else MISSING


def budgets(part: Part) -> Callable[[Path], str]:
    """Setting × steps -> means over seeds of the plain score and of the detector.

    Args:
        part: "frozen" or "scratch".
    """

    def section(results: Path) -> str:
        found = [row for row in read(results) if row.part == part]
        if not found:
            return MISSING
        classes = list(dict.fromkeys((row.dataset, row.normal) for row in found))
        scores = [(of, score) for of in classes for score in (PLAIN, detector_of(of[0]))]
        titles = " | ".join(f"{normal} {score}" for (_, normal), score in scores)
        lines = [f"| setting | steps | {titles} |", f"|---|---|{'---|' * len(scores)}"]
        for setting, steps in _ordered(found):
            cells = []
            for of, score in scores:
                same = [
                    row.auroc
                    for row in found
                    if ((row.dataset, row.normal), row.score, row.setting, row.steps) == (of, score, setting, steps)
                ]
                cells.append(_mean(same))
            lines.append(f"| {setting} | {steps} | {' | '.join(cells)} |")
        return "\n".join(lines)

    return section


def _ordered(found: Sequence[LearningRow]) -> list[tuple[str, int]]:
    """Settings in the order of `STYLES` reversed, steps ascending."""
    order = list(STYLES)
    return sorted({(row.setting, row.steps) for row in found}, key=lambda key: (-order.index(key[0]), key[1]))


def _mean(values: Sequence[float]) -> str:
    """The mean, with the number of seeds where it is not three."""
    if not values:
        return "–"
    count = "" if len(values) == len(SEEDS) else f" ({len(values)} seed{'s' if len(values) > 1 else ''})"
    return f"{mean(values):.4f}{count}"


SECTIONS: dict[str, Callable[[Path], str]] = {
    "learning-recipes": recipes,
    "learning-frozen": budgets("frozen"),
    "learning-scratch": budgets("scratch"),
    "learning-sizes": sizes,
}


def draw(results: Path, folder: Path) -> Path | None:
    """AUROC against steps: one column for each class, the frozen encoder above, the one from scratch below.

    Args:
        results: folder of rows.
        folder: of pictures.

    Returns:
        The file that was written, None if there are no rows.
    """
    found = [row for row in read(results) if row.part in ("frozen", "scratch")]
    if not found:
        return None
    panels = [("frozen", "elpv", kind) for kind in TYPES] + [("scratch", *of) for of in SCRATCH]
    figure, axes = figure_of(1, len(panels), 3.4 * len(panels), 4.0)
    for plot, (part, dataset, normal) in zip(axes[0], panels, strict=True):
        same = [row for row in found if (row.part, row.dataset, row.normal) == (part, dataset, normal)]
        _panel(plot, same, detector_of(dataset))
        plot.set_title(f"{normal}, {'frozen encoder' if part == 'frozen' else 'from scratch'}", fontsize=10)
    axes[0][0].set_ylabel("AUROC")
    legend_below(figure, axes[0], 4, fontsize=9)
    figure.suptitle(
        "memories of 64 prototypes per scale; solid: plain deviation, dashed: detector; mean and range of the seeds",
        fontsize=10,
    )
    path = folder / "learning.png"
    save(figure, path)
    return path


def _panel(plot: Any, found: Sequence[LearningRow], detector: str) -> None:
    """A line for each setting that has steps, a level for each that has none."""
    longest = max((row.steps for row in found), default=1)
    for setting, (colour, marker) in STYLES.items():
        for score in (PLAIN, detector):
            values: dict[int, list[float]] = {}
            for row in found:
                if (row.setting, row.score) == (setting, score):
                    values.setdefault(row.steps, []).append(row.auroc)
            steps = sorted(values)
            if not steps:
                continue
            means = [mean(values[step]) for step in steps]
            style = {
                "color": colour,
                "linestyle": LINES[score],
                "label": f"{setting}, {'plain' if score == PLAIN else 'detector'}",
            }
            if steps == [0]:
                plot.plot([0, longest], means * 2, linewidth=1.2, **style)
                plot.fill_between([0, longest], min(values[0]), max(values[0]), color=colour, alpha=0.12, linewidth=0)
                continue
            low = [average - min(values[step]) for step, average in zip(steps, means, strict=True)]
            high = [max(values[step]) - average for step, average in zip(steps, means, strict=True)]
            plot.errorbar(steps, means, yerr=[low, high], marker=marker, markersize=5, capsize=2, **style)
    plot.set_xlabel("gradient steps")
    plot.grid(True, alpha=0.3)
