"""The figures of a run, drawn from its log, its scores and its memories."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anomem.data import Images, Task
from anomem.errors import UserError
from anomem.evaluate.baselines import baselines, pixels
from anomem.plots import extremes, loss_curves, prototypes, roc_curves, score_histograms, tsne
from anomem.reference.normalize import normalize_rows
from anomem.reference.retrieval import hopfield_retrieve
from anomem.scoring import Scorer, score_images
from anomem.train import RunDirectory


def draw_figures(run: RunDirectory, task: Task, scorer: Scorer, seed: int = 0) -> list[Path]:
    """Loss curves, histograms, ROC against the baselines, extremes with maps, prototypes, t-SNE.

    Args:
        run: where they go, into its folder figures/.
        task: on the scorer's device.
        scorer: fitted.
        seed: of baselines and t-SNE.

    Returns:
        The files.

    Raises:
        UserError: a package that the figures need cannot be imported.
    """
    names = ("loss", "histograms", "roc", "extremes", "prototypes", "tsne")
    paths = {name: run.figures / f"{name}.png" for name in names}
    scored = score_images(scorer, task.test)
    truth = task.test_is_anomaly.cpu()
    best = "stage2" if "stage2" in scored.scores else "detector"
    test = pixels(task.test)
    masks = None if task.test_masks is None else task.test_masks.cpu()
    try:
        loss_curves(run.rows(), paths["loss"])
        score_histograms(scored.scores, truth, paths["histograms"])
        both = {**scored.scores, **baselines(task.to("cpu"), seed)}
        roc_curves(both, truth, paths["roc"], highlight=tuple(scored.scores))
        extremes(
            test,
            scored.scores[best],
            scored.maps["detector"],
            truth,
            paths["extremes"],
            kinds=task.test_kinds,
            masks=masks,
        )
        normals = task.train_is_normal.nonzero().flatten()
        weights, _ = last_scale(scorer, task.train, normals)
        prototypes(pixels(task.train, normals.cpu()), weights, paths["prototypes"])
        memory = scorer.model.memories[-1]
        _, vectors = last_scale(scorer, task.test, torch.arange(len(task.test)))
        stored = normalize_rows(memory.prototypes.detach(), memory.normalize).cpu()
        tsne(stored, vectors[~truth], vectors[truth], paths["tsne"], seed=seed)
    except ImportError as error:
        raise UserError(f"the figures need a package that cannot be imported ({error}); install anomem[lab]") from error
    return list(paths.values())


@torch.no_grad()
def last_scale(scorer: Scorer, images: Images, order: Tensor) -> tuple[Tensor, Tensor]:
    """How images read the coarsest memory: means over positions, on the CPU.

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
        read = hopfield_retrieve(
            query, memory.prototypes, beta=memory.beta, steps=memory.steps, normalize=memory.normalize
        )
        weights.append(read.weights.mean(dim=1).cpu())
        vectors.append(normalize_rows(query, memory.normalize).mean(dim=1).cpu())
    return torch.cat(weights), torch.cat(vectors)
