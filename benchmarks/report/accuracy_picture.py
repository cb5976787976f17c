"""The picture of docs/RESULTS.md: what each score reaches in each setting, seed by seed."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.rows import read
from benchmarks.accuracy.tables import GROUPS, Group, seeds_of
from benchmarks.report.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, RED, figure_of, save

SHOWN = (GROUPS[0], GROUPS[2], GROUPS[3])
# Score -> colour and marker.
STYLES = {
    "plain": (ORANGE, "o"),
    "detector": (BLUE, "D"),
    "detector/features": (GREEN, "^"),
    "stage2": (RED, "s"),
    "kNN-3": (BLACK, "x"),
    "isolation forest": (GREY, "+"),
    "patch PCA": (BLACK, "*"),
}
TICKS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)


def draw(results: Path, folder: Path) -> Path | None:
    """One panel for each group of classes; the axis gives every halving of the distance to 1 the same room.

    Args:
        results: folder of rows.
        folder: where the picture goes.

    Returns:
        The file that was written, None where there are no rows.
    """
    rows = read(results / "accuracy.jsonl")
    if not rows:
        return None
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure, axes = figure_of(1, len(SHOWN), 4.3 * len(SHOWN), 4.6)
    for plot, group in zip(axes[0], SHOWN, strict=True):
        _panel(plot, group, {s: {score: seeds_of(rows, group, s, score) for score in STYLES} for s in settings})
    handles = {
        label: handle for plot in axes[0] for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(STYLES), frameon=False)
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
            means = [mean(values) for values in seeds.values()]
            lowest, highest = min([lowest, *means]), max([highest, *means])
            fill = {"facecolors": "none"} if marker in "oD^s" else {}
            if means:
                plot.scatter(means, [height] * len(means), marker=marker, color=colour, s=46, label=score, **fill)
    plot.set_xscale("function", functions=(_stretch, _shrink))
    limits = (1 - 1.1 * (1 - lowest), 1 - 0.7 * (1 - highest))
    ticks = [tick for tick in TICKS if limits[0] <= tick <= limits[1]]
    plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60)
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
