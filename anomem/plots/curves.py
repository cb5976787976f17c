"""Figures with axes: training curves, histograms of scores, ROC curves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from anomem.evaluate.metrics import auroc, roc_curve
from anomem.plots.style import AMBER, ANOMALOUS, FAINT, GREEN, INK, MUTED, NORMAL, PURPLE, SKY, figure, shades
from anomem.validation import require

# What the logged quantities are called under a figure.
TERMS = {
    "loss": "loss",
    "contrast": "contrast (nats)",
    "variance": "variance hinge",
    "perplexity": "prototypes per query",
    "effective": "prototypes in use",
    "mean_length": "length of the mean retrieval",
}
STAGES = {"stage1": "Stage 1", "stage2": "Stage 2"}
PANEL = (3.4, 2.4)  # inches


def loss_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Every logged quantity over the training steps, one panel each, one line per scale.

    Args:
        rows: as in a run's JSONL log: "step", optionally "stage", and numbers named "loss" or "quantity/scale".
        path: where to write.

    Raises:
        ArgumentError: no rows, or none with a loss.
    """
    panels = _panels(rows)
    require(len(panels) > 0, "rows", 'rows with "step" and "loss"', lambda: f"{len(rows)} rows without")
    scales = list(dict.fromkeys(scale for lines in panels.values() for scale in lines if scale))
    colours = dict(zip(scales, shades(len(scales)), strict=True)) | {"": INK}
    several = len({stage for stage, _ in panels}) > 1
    columns = min(3, len(panels))
    with figure(path, columns * PANEL[0], math.ceil(len(panels) / columns) * PANEL[1] + 0.4, gap=0.08) as drawn:
        grid = drawn.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
        handles = {}
        for axes, ((stage, term), lines) in zip(grid.flat, panels.items(), strict=False):
            for scale, points in lines.items():
                marker = "o" if len(points) == 1 else None  # one point makes no line
                (handles[scale],) = axes.plot(
                    *zip(*points, strict=True), color=colours[scale], marker=marker, label=f"scale {scale}"
                )
            named = TERMS.get(term, term)
            axes.set_title(f"{STAGES.get(stage, stage)}: {named}" if several else named)
            axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.margins(x=0)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        if scales:
            drawn.legend(handles=[handles[s] for s in scales], loc="outside lower center", ncols=min(6, len(scales)))


def score_histograms(
    scores: Tensor | Mapping[str, Tensor], is_anomaly: Tensor, path: str | os.PathLike[str], bins: int = 30
) -> None:
    """How the scores of normal and anomalous images are distributed; each class adds up to 100 %.

    Args:
        scores: [T], or several by name, one panel each.
        is_anomaly: [T] bool.
        path: where to write.
        bins: of equal width over all but the highest percent of the scores, which share the last bin.

    Raises:
        ArgumentError: as `auroc`.
    """
    named = {"anomaly score": scores} if isinstance(scores, Tensor) else dict(scores)
    require(len(named) > 0, "scores", "at least one score", "none")
    columns = 2 if len(named) == 4 else min(3, len(named))
    lines = math.ceil(len(named) / columns)
    with figure(path, max(4.6, columns * 3.6), lines * 2.6 + 0.4, gap=0.08) as drawn:
        grid = drawn.subplots(lines, columns, squeeze=False)
        for axes, (name, values) in zip(grid.flat, named.items(), strict=False):
            _histogram(axes, name, values.detach().cpu().double(), is_anomaly.cpu(), bins)
        for axes in list(grid.flat)[len(named) :]:
            axes.set_axis_off()
        drawn.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _histogram(axes: Axes, name: str, scores: Tensor, is_anomaly: Tensor, bins: int) -> None:
    area = auroc(scores, is_anomaly)
    low, high = float(scores.min()), float(scores.quantile(0.99))
    edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64).tolist()
    clipped = scores.clamp_max(edges[-1])
    for label, colour, chosen in (("normal", NORMAL, ~is_anomaly), ("anomalous", ANOMALOUS, is_anomaly)):
        weights = [100 / int(chosen.sum())] * int(chosen.sum())
        # A pale area and a firm outline, so that both classes show where they overlap.
        values = clipped[chosen].tolist()
        name_of_class = f"{label} images"
        axes.hist(values, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.3, label=name_of_class)
        axes.hist(values, edges, weights=weights, histtype="step", color=colour, linewidth=1.4)
    axes.set_title(f"{name}: AUROC {area:.3f}" if name != "anomaly score" else f"AUROC {area:.3f}")
    axes.set_xlabel("anomaly score")
    axes.set_ylabel("share of the class per bin (%)")
    axes.margins(x=0.01)


def roc_curves(
    scores: Mapping[str, Tensor],
    is_anomaly: Tensor,
    path: str | os.PathLike[str],
    highlight: Sequence[str] = (),
) -> None:
    """ROC curves, best first; where the best is above 0.9, a second panel shows the upper left corner.

    Args:
        scores: name -> [T], higher is more anomalous.
        is_anomaly: [T] bool.
        path: where to write.
        highlight: names drawn bold and full, the rest dashed; by default all are full.

    Raises:
        ArgumentError: as `auroc`, or no scores.
    """
    require(len(scores) > 0, "scores", "at least one score", "none")
    areas = {name: auroc(values.cpu(), is_anomaly.cpu()) for name, values in scores.items()}
    ranked = sorted(areas, key=lambda name: -areas[name])
    corner = areas[ranked[0]] > 0.9
    palette = [NORMAL, ANOMALOUS, GREEN, PURPLE, AMBER, SKY, INK, MUTED]
    # By place in the given order, so that a method has one colour in every figure of a set.
    colours = {name: palette[i % len(palette)] for i, name in enumerate(scores)}
    with figure(path, 10.4 if corner else 6.6, 3.9, gap=0.08) as drawn:
        panels = drawn.subplots(1, 2 if corner else 1, squeeze=False)[0]
        for axes in panels:
            axes.plot([0, 100], [0, 100], color=FAINT, lw=1.0, zorder=0)
            for name in ranked:
                false_positive, true_positive = roc_curve(scores[name].cpu(), is_anomaly.cpu())
                first = not highlight or name in highlight
                axes.plot(
                    (100 * false_positive).tolist(), (100 * true_positive).tolist(), color=colours[name],
                    lw=2.0 if first and highlight else 1.6, ls="-" if first else (0, (4, 2)),
                    label=f"{areas[name]:.3f}  {name}", clip_on=True,
                )  # fmt: skip
            axes.set_xlabel("normal images called anomalous (%)")
            axes.set_ylabel("anomalous images found (%)")
            axes.set_aspect("equal")
            axes.set(xlim=(-1, 101), ylim=(-1, 101))
        panels[0].set_title("ROC")
        if corner:
            panels[1].set(xlim=(-0.25, 25), ylim=(75, 100.25), title="its upper left corner")
        drawn.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right center", title="AUROC", alignment="left"
        )


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """(stage, term) -> scale ("" where there is none) -> points (step, value), in the order of appearance."""
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            term, _, scale = name.partition("/")
            if "step" in row and (term == "loss" or scale):
                lines = panels.setdefault((str(row.get("stage", "")), term), {})
                lines.setdefault(scale, []).append((int(row["step"]), float(value)))
    return panels
