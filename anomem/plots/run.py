"""All figures of a run, from its log, its scorer and its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.data import Images, Task
from anomem.errors import UserError
from anomem.evaluate.baselines import baselines, pixels, require_packages
from anomem.plots import extremes, loss_curves, prototypes, roc_curves, score_histograms, tsne
from anomem.reference.retrieve import hopfield_retrieve, normalize_rows
from anomem.scoring import FittedDetector, Scorer, score_images
from anomem.scoring.decision import normals_needed

SHOWN = 8
"""Images of the most and of the least anomalous ones."""


def figure_files(folder: Path) -> dict[str, Path]:
    """Name of each figure -> its file in a folder."""
    names = ("loss", "histograms", "roc", "extremes", "prototypes", "tsne")
    return {name: folder / f"{name}.png" for name in names}


def draw_figures(
    rows: Sequence[Mapping[str, Any]], task: Task, scorer: Scorer, folder: Path, seed: int = 0
) -> list[Path]:
    """Loss curves, histograms, ROC against the baselines, extremes with maps, prototypes, t-SNE.

    Where the test images are of one class only there is no ROC.

    Args:
        rows: of the run's log.
        task: on the scorer's device.
        scorer: fitted.
        folder: of the figures; made if missing.
        seed: of baselines and t-SNE.

    Returns:
        The files.

    Raises:
        UserError: a package that the figures need cannot be imported, or a file cannot be written.
    """
    require_packages()
    is_anomaly = task.test_is_anomaly.cpu()
    two_classes = bool(is_anomaly.any()) and not bool(is_anomaly.all())
    paths = figure_files(folder)
    if not two_classes:
        del paths["roc"]
    scored = score_images(scorer, task.test)
    best = "stage2" if "stage2" in scored.scores else "detector"
    try:
        if rows:
            loss_curves(rows, paths["loss"])
        else:  # nothing was trained
            del paths["loss"]
        score_histograms(scored.scores, is_anomaly, paths["histograms"])
        if two_classes:
            everything = {**scored.scores, **baselines(task.to("cpu"), seed)}
            roc_curves(everything, is_anomaly, paths["roc"], highlight=tuple(scored.scores))
        extremes(
            pixels(task.test),
            scored.scores[best],
            scored.maps["detector"],
            is_anomaly,
            paths["extremes"],
            kinds=task.test_kinds,
            files=task.test_paths,
            score=best,
            masks=None if task.test_masks is None else task.test_masks.cpu(),
        )
        normals = task.train_is_normal.nonzero().flatten()
        weights, _ = _coarsest_retrieval(scorer, task.train, normals)
        prototypes(pixels(task.train, normals.cpu()), weights, paths["prototypes"])
        memory = scorer.model.memories[-1]
        _, vectors = _coarsest_retrieval(scorer, task.test, torch.arange(len(task.test)))
        stored = normalize_rows(memory.prototypes.detach(), memory.normalize).cpu()
        tsne(stored, vectors[~is_anomaly], vectors[is_anomaly], paths["tsne"], seed=seed)
    except ImportError as error:
        raise UserError(f"the figures need a package that cannot be imported ({error}); install anomem[lab]") from error
    return list(paths.values())


def draw_fitted(task: Task, detector: FittedDetector, folder: Path) -> list[Path]:
    """Histograms, ROC and extremes with maps of a fitted detector.

    Where the test images are of one class only there is no ROC.

    Args:
        task: on the detector's device.
        detector: fitted.
        folder: of the figures; made if missing.

    Returns:
        The files.
    """
    is_anomaly = task.test_is_anomaly.cpu()
    paths = {name: path for name, path in figure_files(folder).items() if name in ("histograms", "roc", "extremes")}
    if bool(is_anomaly.all()) or not bool(is_anomaly.any()):
        del paths["roc"]
    found = detector.over(task.test, maps=False)
    calibration, alpha = detector.calibration, detector.alpha
    decides = calibration.count >= normals_needed(alpha)
    lines = {name: calibration.threshold(name, alpha) for name in found.scores} if decides else None
    score_histograms(found.scores, is_anomaly, paths["histograms"], thresholds=lines)
    if "roc" in paths:
        roc_curves(found.scores, is_anomaly, paths["roc"], highlight=(detector.lead,))
    order = found.scores[detector.lead].argsort(descending=True, stable=True)
    count = min(SHOWN, len(order) // 2)
    rows = torch.cat([order[:count], order[len(order) - count :]])
    images = pixels(task.test, rows)  # those that are shown: a large test set is not held
    maps = [detector(part.to(detector.model.device)).maps["local"].cpu() for part in images.split(detector.batch_size)]
    extremes(
        images,
        found.scores[detector.lead][rows],
        torch.cat(maps),
        is_anomaly[rows],
        paths["extremes"],
        kinds=[task.test_kinds[i] for i in rows.tolist()],
        files=None if task.test_paths is None else [task.test_paths[i] for i in rows.tolist()],
        score=detector.lead,
        masks=None if task.test_masks is None else task.test_masks.cpu()[rows],
        count=count,
        unit="distance from normal deviations",
        threshold=calibration.pixel_threshold("local", alpha) if decides else None,
    )
    return list(paths.values())


@torch.no_grad()
def _coarsest_retrieval(scorer: Scorer, images: Images, order: Tensor) -> tuple[Tensor, Tensor]:
    """Retrieval from the memory of the coarsest scale, averaged over positions, on the CPU.

    Args:
        scorer: gives the model.
        images: on its device.
        order: [N] int64, which images.

    Returns:
        Retrieval weights [N, M], and normalised queries [N, d].
    """
    model, memory = scorer.model, scorer.model.memories[-1]
    weights, vectors = [], []
    for batch, _ in images.batches(order, scorer.config.batch_size):
        query = model.queries(model(batch))[-1]  # [b, P, d]
        retrieved = hopfield_retrieve(
            query, memory.prototypes, beta=memory.beta, steps=memory.steps, normalize=memory.normalize
        )
        weights.append(retrieved.weights.mean(dim=1).cpu())
        vectors.append(normalize_rows(query, memory.normalize).mean(dim=1).cpu())
    return torch.cat(weights), torch.cat(vectors)
