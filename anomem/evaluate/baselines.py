"""Baselines on raw pixels: kNN, one-class SVM, LOF and isolation forest; principal components of patches."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.data import Images, Task
from anomem.errors import optional
from anomem.validation import require


def pixels(images: Images, order: Tensor | None = None) -> Tensor:
    """Raw pixels of a set in [0, 1]: [N, C, H, W] float32 on the CPU.

    Args:
        images: the set.
        order: [n] int64, indices of images; None is all.
    """
    order = torch.arange(len(images)) if order is None else order
    parts = [batch.cpu().float().div_(255) for batch, _ in images.batches(order, 512)]
    return torch.cat(parts)


def require_packages() -> None:
    """Look for what `baselines` needs, before any work is done.

    Raises:
        UserError: scikit-learn is not installed.
    """
    with optional("the comparison with shallow baselines (left out by --no-baselines)"):
        import sklearn  # noqa: F401


def baselines(task: Task, seed: int = 0, at_most: int = 5000) -> dict[str, Tensor]:
    """Scores of the test images by kNN, one-class SVM, LOF and isolation forest, fitted to raw pixels of the normals.

    Args:
        task: labelled anomalies among its training images are not used.
        seed: of the isolation forest, and of the draw where there are more normals than `at_most`.
        at_most: largest number of normals to fit to; the cost of the kernel and neighbour methods is quadratic.

    Returns:
        Name -> [T] float64, higher is more anomalous: "kNN-3" (mean distance to the three nearest normals),
        "one-class SVM" (RBF kernel, gamma by the data's variance, nu 0.1), "LOF" (20 neighbours), "isolation forest"
        (200 trees).

    Raises:
        ArgumentError: fewer than two normals, which have no neighbours.
        UserError: scikit-learn is not installed.
    """
    require_packages()
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
    from sklearn.svm import OneClassSVM

    normals = int(task.train_is_normal.sum())
    require(normals >= 2, "task", "at least two normal training images", normals)
    train, test = (x.flatten(1).numpy() for x in (_normals(task, seed, at_most), pixels(task.test)))
    neighbours = NearestNeighbors(n_neighbors=min(3, len(train))).fit(train)
    scores = {"kNN-3": neighbours.kneighbors(test)[0].mean(1)}
    outlier_factor = LocalOutlierFactor(n_neighbors=min(20, len(train) - 1), novelty=True)
    for name, detector in (
        ("one-class SVM", OneClassSVM(gamma="scale", nu=0.1)),
        ("LOF", outlier_factor),
        ("isolation forest", IsolationForest(n_estimators=200, random_state=seed)),
    ):
        scores[name] = -cast(Any, detector).fit(train).score_samples(test)
    return {name: torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)) for name, values in scores.items()}


def patch_pca_maps(task: Task, seed: int = 0, side: int = 8, components: int = 16, at_most: int = 100_000) -> Tensor:
    """Localisation baseline: error of reconstructing each patch from the principal components of normal patches.

    Args:
        task: labelled anomalies among its training images are not used.
        seed: of the draw where there are more patches than `at_most`.
        side: of a patch in pixels.
        components: number kept; the residual is orthogonal to them.
        at_most: largest number of patches to fit to.

    Returns:
        [T, H, W] float32: squared residual per pixel, mean over the patches that cover it.
    """
    height, width = task.test.size
    require(side <= min(height, width), "side", lambda: f"at most {min(height, width)}", side)
    normals = F.unfold(_normals(task, seed, max(2, at_most // (height * width))), side)  # [N, C·side², L]
    rows = normals.movedim(1, 2).flatten(0, 1)  # [N·L, C·side²]
    require(1 <= components < rows.shape[1], "components", lambda: f"from 1 to {rows.shape[1] - 1}", components)
    mean = rows.mean(0)
    covariance = (rows - mean).T.double() @ (rows - mean).double() / len(rows)
    basis = torch.linalg.eigh(covariance).eigenvectors[:, -components:].float()
    maps = []
    for batch in pixels(task.test).split(64):
        patches = F.unfold(batch, side).movedim(1, 2) - mean  # [b, L, C·side²]
        residual = (patches - (patches @ basis) @ basis.T).square().movedim(1, 2)
        covered = F.fold(torch.ones_like(residual), (height, width), side)
        maps.append((F.fold(residual, (height, width), side) / covered).mean(1))
    return torch.cat(maps)


def _normals(task: Task, seed: int, at_most: int) -> Tensor:
    rows = task.train_is_normal.cpu().nonzero().flatten()
    if len(rows) > at_most:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:at_most]]
    return pixels(task.train, rows)
