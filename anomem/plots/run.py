"""All figures of a run, from its log, its scorer and its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.data import Images, Task
from anomem.errors import UserError
from anomem.evaluate.baselines import baselines, pixels
from anomem.plots import extremes, loss_curves, prototypes, roc_curves, score_histograms, tsne
from anomem.reference.retrieve import hopfield_retrieve, normalize_rows
from anomem.scoring import Scorer, score_images


def draw_figures(
    rows: Sequence[Mapping[str, Any]], task: Task, scorer: Scorer, folder: Path, seed: int = 0
) -> list[Path]:
    """Loss curves, histograms, ROC against the baselines, extremes with maps, prototypes, t-SNE.

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
    names = ("loss", "histograms", "roc", "extremes", "prototypes", "tsne")
    paths = {name: folder / f"{name}.png" for name in names}
    scored = score_images(scorer, task.test)
    is_anomaly = task.test_is_anomaly.cpu()
    best = "stage2" if "stage2" in scored.scores else "detector"
    try:
        loss_curves(rows, paths["loss"])
        score_histograms(scored.scores, is_anomaly, paths["histograms"])
        everything = {**scored.scores, **baselines(task.to("cpu"), seed)}
        roc_curves(everything, is_anomaly, paths["roc"], highlight=tuple(scored.scores))
        extremes(
            pixels(task.test),
            scored.scores[best],
            scored.maps["detector"],
            is_anomaly,
            paths["extremes"],
            kinds=task.test_kinds,
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
