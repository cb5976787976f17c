"""The figures of a fitted detector: its scores, its false alarms, and what it must beat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.data import Task
from anomem.evaluate.metrics import aupro, pixel_auroc
from anomem.evaluate.report import PIXEL_MEASURES, image_metrics, undefined_measures
from anomem.scoring.detector import Gaussians, MomentSums
from anomem.scoring.fill import FeatureRows, fill_prototypes, nearest_in_blocks
from anomem.scoring.fitted import EncodedImages, FittedDetector, Verdicts
from anomem.train import FitConfig

CORESET = 1000
"""PatchCore's prototypes."""
COMPONENTS = 64
"""Of the baseline PCA on pixels."""
PADIM_BYTES = 2**30
"""PaDiM is left out where its covariances would take more."""
MEANINGS = {
    "plain": "deviation of the features from what the memory returns, mean of the top tenth of the positions",
    "local": "distance from the Gaussians of the positions, mean of the top tenth: local defects",
    "whole": "distance of the image's mean deviation: another material or object",
    "both": "plain and local, in units of their spread over normals, added",
    "either": "the larger of local and whole, in units of their spread",
    "labelled": "the one-class score joined with a regression on labelled defects",
}


def report(
    detector: FittedDetector, task: Task, config: FitConfig, found: Verdicts | None = None, with_baselines: bool = True
) -> dict[str, Any]:
    """The content of `metrics.json`.

    Args:
        detector: fitted.
        task: on any device.
        config: of the run.
        found: of the test images, if it is known already; with maps where there are masks.
        with_baselines: also measure PatchCore and PaDiM on the same encoder, and pixels.
    """
    found = found or detector.over(task.test, maps=task.test_masks is not None)
    missing = undefined_measures(task)
    scores = image_metrics(found.scores, task.test_is_anomaly)
    if task.test_masks is not None and "pixel_auroc" not in missing:
        for name, maps in found.maps.items():
            scores[name]["pixel_auroc"] = pixel_auroc(maps, task.test_masks.cpu())
            if "aupro" not in missing:
                scores[name]["aupro"] = aupro(maps, task.test_masks.cpu())
    same_encoder, on_pixels = {}, {}
    if with_baselines:
        same_encoder = baselines_on_the_encoder(detector, task, config.run.seed)
        on_pixels = pixel_baselines(task)
    return {
        "task": task.name,
        "train_images": len(task.train),
        "train_anomalies": int((~task.train_is_normal).sum()),
        "test_images": len(task.test),
        "test_anomalies": int(task.test_is_anomaly.sum()),
        "alignment": detector.scorer.alignment,
        "lead": detector.lead,
        "missing": missing,
        "verdict": verdict_metrics(detector, found, task.test_is_anomaly),
        "scores": scores,
        "controls": {},
        "same_encoder": image_metrics(same_encoder, task.test_is_anomaly),
        "baselines": image_metrics(on_pixels, task.test_is_anomaly),
    }


def verdict_metrics(detector: FittedDetector, found: Verdicts, is_anomaly: Tensor) -> dict[str, Any]:
    """What the verdict promised and what it did on test images.

    Args:
        detector: fitted.
        found: of the test images.
        is_anomaly: [T] bool.
    """
    truth = is_anomaly.cpu()
    normals, anomalies = int((~truth).sum()), int(truth.sum())
    measured: dict[str, Any] = {
        "alpha": detector.alpha,
        "promise": detector.calibration.promise(detector.alpha),
        "calibration_normals": detector.calibration.count,
        "normals": normals,
        "anomalies": anomalies,
    }
    if found.verdicts is not None:
        measured["false_alarms"] = int(found.verdicts[~truth].sum())
        measured["found"] = int(found.verdicts[truth].sum())
    return measured


def explained(metrics: Mapping[str, Any]) -> list[str]:
    """What the rows of the table mean, and the verdict's promise beside what was measured; one line each.

    Args:
        metrics: from `report`.
    """
    lines = [
        f"{name}: {meaning}{'; it decides' if name == metrics['lead'] else ''}"
        for name, meaning in MEANINGS.items()
        if name in metrics["scores"]
    ]
    if metrics["same_encoder"]:
        lines.append(f"same encoder: PatchCore (coreset of {CORESET}) and PaDiM on the two finest scales, joined")
        lines.append("pixels: each image standardised for kNN and PCA; brightness is its distance from the normals'")
    lines.append(f"promised: {metrics['verdict']['promise']}")
    verdict = metrics["verdict"]
    if "false_alarms" in verdict:
        parts = [
            f"{verdict[count]} of {verdict[of]} {what} ({verdict[count] / verdict[of]:.1%})"
            for count, of, what in (
                ("false_alarms", "normals", "test normals called anomalous"),
                ("found", "anomalies", "anomalies found"),
            )
            if verdict[of]
        ]
        lines.append(f"measured: {', '.join(parts)}")
    missing = sorted({reason for measure, reason in metrics["missing"].items() if measure not in PIXEL_MEASURES})
    return lines + [f"not measured: {reason}" for reason in missing]


@torch.no_grad()
def baselines_on_the_encoder(detector: FittedDetector, task: Task, seed: int = 0) -> dict[str, Tensor]:
    """PatchCore and PaDiM on a detector's encoder: see `encoder_baselines`.

    Args:
        detector: fitted.
        task: its normal training images are fitted, its T test images scored.
        seed: of the coreset.
    """
    normals = task.train_is_normal.cpu().nonzero().flatten()
    train, test = (
        EncodedImages(detector.model, images, detector.batch_size, at_most=0) for images in (task.train, task.test)
    )
    return encoder_baselines(train.part(normals), test, seed)


@torch.no_grad()
def encoder_baselines(train: EncodedImages, test: EncodedImages, seed: int = 0) -> dict[str, Tensor]:
    """PatchCore and PaDiM on the encoder's two finest scales, fitted to all normals.

    The maps get a 3×3 mean, the coarser one is brought to the finer one's size, and both are joined (Roth et al. 2022,
    Defard et al. 2021). PatchCore: greedy coreset, distance to the nearest of it, without re-weighting.

    Args:
        train: N normals.
        test: T images, encoded by the same model.
        seed: of the coreset.

    Returns:
        Name -> [T]: "PatchCore, max", "PatchCore, top tenth", "PaDiM, max", "PaDiM, top tenth". Without PaDiM where its
        Gaussians would need too much memory.
    """
    sizes = train.model.encoder.sizes[:2]

    def joined(images: EncodedImages) -> Iterable[Tensor]:
        for queries in images.rows():
            yield join_maps(queries[:2], sizes).cpu()  # [b, P, d]

    held = FeatureRows(seed=seed)
    sums: MomentSums | None = None
    for x in joined(train):
        held.add(x.flatten(0, 1))
        positions, features = x.shape[1:]
        if positions * features**2 * 8 <= PADIM_BYTES:
            sums = sums or MomentSums(positions, features)
            sums.update(x)
    rows = held.rows()
    coreset = fill_prototypes(rows, min(CORESET, len(rows)), "coreset", seed=seed)
    gaussians = None
    if sums is not None and sums.count > 1:
        gaussians = Gaussians(*sums.first.shape)
        gaussians.fit(sums)
    parts: dict[str, list[Tensor]] = {}
    for x in joined(test):
        distance = nearest_in_blocks(x.flatten(0, 1), coreset).distance.sqrt().view(x.shape[:2])
        maps = {"PatchCore": distance} if gaussians is None else {"PatchCore": distance, "PaDiM": gaussians(x)}
        for name, d in maps.items():
            parts.setdefault(f"{name}, max", []).append(d.amax(dim=1))
            parts.setdefault(f"{name}, top tenth", []).append(d.topk(max(1, d.shape[1] // 10), dim=1).values.mean(1))
    return {name: torch.cat(values) for name, values in parts.items()}


def join_maps(queries: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Features of several scales at the finest one's positions, after a 3×3 mean.

    Args:
        queries: S tensors [B, P_s, d_s].
        sizes: (H_s, W_s).

    Returns:
        [B, P_1, Σ d_s].
    """
    found = []
    for query, size in zip(queries, sizes, strict=True):
        smooth = F.avg_pool2d(query.mT.unflatten(2, size), 3, 1, 1, count_include_pad=False)
        found.append(F.interpolate(smooth, sizes[0], mode="bilinear", align_corners=False).flatten(2).mT)
    return torch.cat(found, dim=2)


def pixel_baselines(task: Task, side: int = 64) -> dict[str, Tensor]:
    """What needs no network.

    Args:
        task: its normal training images are fitted, its T test images scored.
        side: to which larger images are brought, in pixels.

    Returns:
        Name -> [T]: "kNN-3" and "PCA-64 residual" on pixels that are standardised in each image, and "brightness", how
        far an image's mean is from the normals'.
    """
    normals = task.train_is_normal.cpu().nonzero().flatten()
    means, rows = [], []
    for images, order in ((task.train, normals), (task.test, torch.arange(len(task.test)))):
        parts, of_image = [], []
        for uint8, _ in images.batches(order, 32):  # large images are not held at their size
            batch = uint8.cpu().float().div_(255)
            of_image.append(batch.mean(dim=(1, 2, 3)))
            if max(images.size) > side:
                batch = F.interpolate(batch, (side, side), mode="bilinear", antialias=True)
            parts.append(batch.flatten(1))
        flat = torch.cat(parts)
        means.append(torch.cat(of_image))
        rows.append((flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True).clamp_min(1e-6))
    train, test = rows
    near = torch.cdist(test, train).topk(min(3, len(train)), dim=1, largest=False).values.mean(dim=1)
    centre = train.mean(dim=0)
    basis = torch.linalg.svd(train - centre, full_matrices=False).Vh[:COMPONENTS]
    inside = test - centre
    residual = torch.linalg.vector_norm(inside - (inside @ basis.T) @ basis, dim=1)
    return {"kNN-3": near, "PCA-64 residual": residual, "brightness": (means[1] - means[0].median()).abs()}
