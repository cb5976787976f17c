"""Figures of numbers: training curves, histograms of scores, ROC curves, and t-SNE (figure 5 of the paper)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from anomem.errors import optional
from anomem.evaluate.metrics import auroc, roc_curve
from anomem.plots.style import AMBER, ANOMALOUS, FAINT, GREEN, INK, MUTED, NORMAL, PURPLE, SKY, figure, shades
from anomem.validation import require

# Titles of the logged quantities.
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
    with figure(path, columns * PANEL[0], math.ceil(len(panels) / columns) * PANEL[1] + 0.4, gap=0.08) as fig:
        grid = fig.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
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
            fig.legend(handles=[handles[s] for s in scales], loc="outside lower center", ncols=min(6, len(scales)))


def score_histograms(
    scores: Tensor | Mapping[str, Tensor],
    is_anomaly: Tensor,
    path: str | os.PathLike[str],
    bins: int = 30,
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Distribution of the scores of normal and anomalous images; each class adds up to 100 %.

    Args:
        scores: [T], or several by name, one panel each.
        is_anomaly: [T] bool.
        path: where to write.
        bins: of equal width up to the 99th percentile; the last bin takes every higher score.
        thresholds: name -> score above which an image is called anomalous, drawn as a line.

    Raises:
        ArgumentError: as `auroc`.
    """
    named = {"anomaly score": scores} if isinstance(scores, Tensor) else dict(scores)
    require(len(named) > 0, "scores", "at least one score", "none")
    columns = 2 if len(named) == 4 else min(3, len(named))
    lines = math.ceil(len(named) / columns)
    with figure(path, max(4.6, columns * 3.6), lines * 2.6 + 0.4, gap=0.08) as fig:
        grid = fig.subplots(lines, columns, squeeze=False)
        for axes, (name, values) in zip(grid.flat, named.items(), strict=False):
            _histogram(axes, name, values.detach().cpu().double(), is_anomaly.cpu(), bins)
            if thresholds is not None and name in thresholds:
                axes.axvline(thresholds[name], color=MUTED, linestyle="--", linewidth=1.2)
                place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
                axes.annotate("anomalous →", (thresholds[name], 1), (4, -4), color=MUTED, fontsize=9, **place)
        for axes in list(grid.flat)[len(named) :]:
            axes.set_axis_off()
        fig.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _histogram(axes: Axes, name: str, scores: Tensor, is_anomaly: Tensor, bins: int) -> None:
    two_classes = bool(is_anomaly.any()) and not bool(is_anomaly.all())
    area = f"AUROC {auroc(scores, is_anomaly):.3f}" if two_classes else "one class only"
    low, high = float(scores.min()), float(scores.quantile(0.99))
    edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64).tolist()
    clipped = scores.clamp_max(edges[-1])
    for label, colour, chosen in (("normal", NORMAL, ~is_anomaly), ("anomalous", ANOMALOUS, is_anomaly)):
        if not bool(chosen.any()):
            continue
        weights = [100 / int(chosen.sum())] * int(chosen.sum())
        # A pale area and a solid outline, so that both classes are visible where they overlap.
        values = clipped[chosen].tolist()
        name_of_class = f"{label} images"
        axes.hist(values, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.3, label=name_of_class)
        axes.hist(values, edges, weights=weights, histtype="step", color=colour, linewidth=1.4)
    axes.set_title(f"{name}: {area}" if name != "anomaly score" else area)
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
        highlight: names with a thick full line, the rest dashed; by default all lines are full.

    Raises:
        ArgumentError: as `auroc`, or no scores.
    """
    require(len(scores) > 0, "scores", "at least one score", "none")
    areas = {name: auroc(values.cpu(), is_anomaly.cpu()) for name, values in scores.items()}
    ranked = sorted(areas, key=lambda name: -areas[name])
    corner = areas[ranked[0]] > 0.9
    palette = [NORMAL, ANOMALOUS, GREEN, PURPLE, AMBER, SKY, INK, MUTED]
    # By position in the mapping, so that a method has one colour in every figure of a set.
    colours = {name: palette[i % len(palette)] for i, name in enumerate(scores)}
    with figure(path, 10.4 if corner else 6.6, 3.9, gap=0.08) as fig:
        panels = fig.subplots(1, 2 if corner else 1, squeeze=False)[0]
        for axes in panels:
            axes.plot([0, 100], [0, 100], color=FAINT, lw=1.0, zorder=0)
            for name in ranked:
                false_positive, true_positive = roc_curve(scores[name].cpu(), is_anomaly.cpu())
                bold = not highlight or name in highlight
                axes.plot(
                    (100 * false_positive).tolist(), (100 * true_positive).tolist(), color=colours[name],
                    lw=2.0 if bold and highlight else 1.6, ls="-" if bold else (0, (4, 2)),
                    label=f"{areas[name]:.3f}  {name}", clip_on=True,
                )  # fmt: skip
            axes.set_xlabel("normal images called anomalous (%)")
            axes.set_ylabel("anomalous images found (%)")
            axes.set_aspect("equal")
            axes.set(xlim=(-1, 101), ylim=(-1, 101))
        panels[0].set_title("ROC")
        if corner:
            panels[1].set(xlim=(-0.25, 25), ylim=(75, 100.25), title="its upper left corner")
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", title="AUROC", alignment="left")


def tsne(
    prototypes: Tensor,
    normal: Tensor,
    anomalous: Tensor,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    at_most: int = 800,
    title: str = "",
) -> None:
    """t-SNE of prototypes with normal and anomalous samples, by the cosine distance of their vectors.

    Args:
        prototypes: [M, d], normalised as the memory normalises them.
        normal: [N, d] vectors of normal test samples, in the same space.
        anomalous: [A, d] vectors of anomalous ones.
        path: where to write.
        seed: of the t-SNE and of the choice from a set larger than `at_most`.
        at_most: largest number of samples of each kind.
        title: a line above the picture's own.

    Raises:
        ArgumentError: vectors of different lengths, fewer than four, or NaN and infinity among them.
        UserError: scikit-learn is not installed, or the file cannot be written.
    """
    with optional("t-SNE"):
        from sklearn.manifold import TSNE

    generator = torch.Generator().manual_seed(seed)
    groups = [_some(x, at_most, generator) for x in (prototypes, normal, anomalous)]
    same = len({x.shape[-1] for x in groups}) == 1 and all(x.dim() == 2 for x in groups)
    require(same, "prototypes", "[M, d] like [N, d] and [A, d] of the samples", lambda: [list(x.shape) for x in groups])
    rows = torch.cat(groups)
    require(len(rows) >= 4, "normal", "at least four vectors in all", len(rows))
    require(bool(rows.isfinite().all()), "normal", "finite vectors", "NaN or infinity")
    perplexity = min(30.0, (len(rows) - 1) / 3)
    # Start from the first two principal components of the unit vectors, scaled down. The decomposition is exact: a
    # randomised one would make the figure depend on earlier random numbers.
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    components = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    start = (components.U[:, :2] * 1e-2).float()
    embedding = TSNE(metric="cosine", init=start.numpy(), perplexity=perplexity, random_state=seed).fit_transform(
        rows.numpy()
    )
    points_of = torch.from_numpy(embedding).split([len(x) for x in groups])
    with figure(path, 6.4, 5.2) as fig:
        axes = fig.subplots()
        looks = (
            # name, points, fill, outline, marker, area in square points; hollow prototypes hide no sample
            ("normal samples", points_of[1], NORMAL, "white", "o", 18),
            ("anomalous samples", points_of[2], ANOMALOUS, "white", "^", 18),
            ("prototypes", points_of[0], "none", INK, "D", 34),
        )
        for name, points, fill, outline, marker, area in looks:
            axes.scatter(
                points[:, 0].numpy(), points[:, 1].numpy(), s=area, c=fill, edgecolors=outline, marker=marker,
                linewidths=1.1 if fill == "none" else 0.4, label=f"{name} ({len(points)})",
            )  # fmt: skip
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        about = "t-SNE by cosine distance (axes have no unit)"
        axes.set_title(f"{title}\n{about}" if title else about)
        axes.set_aspect("equal", adjustable="datalim")
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


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


def _some(vectors: Tensor, at_most: int, generator: torch.Generator) -> Tensor:
    vectors = vectors.detach().cpu().float()
    return vectors[torch.randperm(len(vectors), generator=generator)[:at_most]]
