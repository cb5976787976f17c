"""Figures of images: the most and least anomalous ones with deviation maps, and the images of each prototype."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from anomem.plots.style import ANOMALOUS, HEAT, MUTED, NORMAL, figure, percent, plain
from anomem.validation import require

TILE = 1.15  # inches


def extremes(
    images: Tensor,
    scores: Tensor,
    maps: Tensor,
    is_anomaly: Tensor,
    path: str | os.PathLike[str],
    *,
    kinds: Sequence[str] | None = None,
    files: Sequence[str] | None = None,
    score: str | None = None,
    masks: Tensor | None = None,
    count: int = 8,
    unit: str = "deviation from the memory",
    threshold: float | None = None,
) -> None:
    """The most and the least anomalous images, each above its deviation map laid over it.

    Args:
        images: [T, C, H, W] uint8 or float in [0, 1].
        scores: [T], higher is more anomalous.
        maps: [T, H, W], on one scale for all images.
        is_anomaly: [T] bool, the ground truth; it colours the frames.
        path: where to write.
        kinds: names to write over the images; "normal" and "anomaly" by default.
        files: file of each image; its name is written too, a long one shortened in the middle.
        score: name of the score, for the caption.
        masks: [T, H, W] bool, the ground truth; its outline is drawn over the map.
        count: images of each kind.
        unit: of the maps.
        threshold: value of the maps above which a pixel is anomalous; its outline is drawn dashed.

    Raises:
        ArgumentError: maps of another shape than the images, or fewer than two images.
        UserError: the file cannot be written.
    """
    require(maps.shape == (len(images), *images.shape[2:]), "maps", "[T, H, W] like the images", maps)
    count = min(count, len(images) // 2)
    require(count > 0, "images", "at least two images", images)
    order = scores.detach().cpu().argsort(descending=True, stable=True)
    chosen = torch.stack([order[:count], order[-count:].flip(0)])  # [2, count], the extreme first
    shown = maps.detach().cpu().float()[chosen]
    limits = [float(q) for q in torch.quantile(shown.flatten(), torch.tensor([0.02, 0.995]))]
    if limits[1] <= limits[0]:
        limits[1] = limits[0] + 1
    names = kinds or ["anomaly" if anomalous else "normal" for anomalous in is_anomaly.tolist()]
    width = max(3.2, count * TILE + 1.5)  # inches; a narrow figure has its caption in two lines
    space = " " if width > 6 else "\n"
    with figure(path, width, 4 * TILE + (1.3 if files is None else 1.7)) as fig:
        grid = fig.subplots(4, count, squeeze=False)
        for half, title in enumerate(("most anomalous", "least anomalous")):
            for column, index in enumerate(chosen[half].tolist()):
                picture, heat = grid[2 * half, column], grid[2 * half + 1, column]
                _show(picture, images[index], ANOMALOUS if bool(is_anomaly[index]) else NORMAL)
                lines = [plain(names[index]), f"{float(scores[index]):.3g}"]
                if files is not None:
                    lines.insert(1, plain(shortened(Path(files[index]).name)))
                picture.set_title("\n".join(lines), loc="center", fontsize=9 if files is None else 8)
                _overlay(heat, images[index], maps[index], limits)
                if threshold is not None and float(maps[index].max()) > threshold:
                    level = maps[index].detach().cpu().float().numpy()
                    heat.contour(level, [threshold], colors=["white"], linewidths=0.9, linestyles="dashed")
                if masks is not None and bool(masks[index].any()):
                    # Two pixels outside of the mask, so that a thin defect is not hidden by its own outline.
                    around = F.max_pool2d(masks[index].cpu().float()[None], 5, 1, 2)[0]
                    heat.contour(around.numpy(), [0.5], colors=["white"], linewidths=0.8)
            grid[2 * half, 0].set_ylabel(title)
            grid[2 * half + 1, 0].set_ylabel("deviation")
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(limits[0], limits[1]), HEAT)
        bar = fig.colorbar(scale, ax=grid, shrink=0.5, aspect=30, pad=0.02, extend="both")
        bar.set_label(unit)
        bar.outline.set_visible(False)
        fig.suptitle(
            f"{title_of(files, score)} stand above each image;{space}frames: blue normal, orange anomalous"
            f"{'' if threshold is None else f';{space}dashed: border of the pixels called anomalous'}.",
            fontsize=9.5, color=MUTED, x=0.01, ha="left",
        )  # fmt: skip


def title_of(files: Sequence[str] | None, score: str | None) -> str:
    """What stands above the images, in words."""
    return f"{'Name' if files is None else 'Name, file'} and {'score' if score is None else f'score ({score})'}"


def shortened(name: str, length: int = 16) -> str:
    """A file name of at most so many characters: its beginning and its end."""
    if len(name) > length:
        name = f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"
    return name.encode(errors="replace").decode()


def prototypes(
    images: Tensor, weights: Tensor, path: str | os.PathLike[str], *, count: int = 12, per_prototype: int = 6
) -> None:
    """The most used prototypes, each as the images that retrieve it most.

    Args:
        images: [N, C, H, W] uint8 or float in [0, 1].
        weights: [N, M] ≥ 0, retrieval weight of each prototype, averaged over the image's queries.
        path: where to write.
        count: prototypes to show.
        per_prototype: images of each.

    Raises:
        ArgumentError: weights of another number of images.
        UserError: the file cannot be written.
    """
    right = weights.dim() == 2 and len(weights) == len(images)
    require(right, "weights", lambda: f"[{len(images)}, M], one row per image", weights)
    weights = weights.detach().cpu().float()
    usage = weights.sum(0) / weights.sum().clamp_min(1e-30)
    most = usage.argsort(descending=True, stable=True)[:count].tolist()
    per_prototype = min(per_prototype, len(images))
    # Two prototypes to a line, with an empty column between them.
    lines, columns = -(-len(most) // 2), 2 * per_prototype + 1
    with figure(path, columns * 0.72 + 1.0, lines * 0.95 + 0.5) as fig:
        ratios = [1.0] * per_prototype + [0.35] + [1.0] * per_prototype
        grid = fig.subplots(lines, columns, squeeze=False, width_ratios=ratios)
        for axes in grid.flat:
            axes.set_axis_off()
        for place, prototype in enumerate(most):
            line, start = place // 2, (place % 2) * (per_prototype + 1)
            for rank, index in enumerate(weights[:, prototype].topk(per_prototype).indices.tolist()):
                axes = grid[line, start + rank]
                axes.set_axis_on()
                _show(axes, images[index], None)
            grid[line, start].set_title(f"prototype {prototype}, {percent(float(usage[prototype]))}", fontsize=9)
        fig.suptitle(
            f"The {len(most)} most used of {weights.shape[1]} prototypes (share of all retrieval): "
            f"the images that retrieve each most",
            fontsize=9.5, color=MUTED, x=0.01, ha="left",
        )  # fmt: skip


def _show(axes: Axes, image: Tensor, frame: str | None) -> None:
    pixels = _pixels(image)
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=2.0)


def _overlay(axes: Axes, image: Tensor, heat: Tensor, limits: Sequence[float]) -> None:
    """The map in colour over the image in pale grey; low values let the image through."""
    grey = _pixels(image)
    grey = grey if grey.dim() == 2 else grey.mean(-1)
    strength = ((heat.detach().cpu().float() - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)
    axes.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.imshow(
        strength.numpy(), cmap=HEAT, vmin=0, vmax=1, alpha=(0.25 + 0.6 * strength).numpy(), interpolation="bilinear"
    )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _pixels(image: Tensor) -> Tensor:
    """[H, W] or [H, W, 3] float in [0, 1] on the CPU."""
    pixels = image.detach().cpu().float() / (255 if image.dtype == torch.uint8 else 1)
    return pixels.movedim(0, -1) if len(pixels) == 3 else pixels.mean(0)
