"""What a cell measures: scores of a trained model, controls, linear evaluation, overlap, cost, margins, maps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anomem.data import Images, load_task
from anomem.errors import optional
from anomem.evaluate.metrics import aupimo, aupro, auroc, pixel_auroc
from anomem.evaluate.report import (
    Metrics,
    calibrate_untrained,
    control,
    feature_scores,
    fill_from_features,
    image_metrics,
    undefined_measures,
)
from anomem.models import AnoMem
from anomem.models.model import parameter_count
from anomem.reference.retrieve import normalize_rows
from anomem.reproduce.cell import Work
from anomem.reproduce.protocol import picked, scaled_task, seconds_per_step
from anomem.scoring import Scorer, fit_scorer, score_images
from anomem.train import FitConfig, RunConfig, fit, train_stage2
from anomem.train.run import head_for

MARGINS = (1.0, 1.5, 2.0, 4.0, 8.0)
"""M of the sweep."""
LABELLED_RATIO = {"elpv": 0.2}
"""Labelled anomalies per normal of linear evaluation; as many as normals where there are that many."""


def image_scores(scorer: Scorer, work: Work) -> Metrics:
    """AUROC of every score, and of the detector on the features z instead of z − HF(z): no memory."""
    scored = score_images(scorer, work.task.test)
    scores = {**scored.scores, "detector/features": feature_scores(scorer, work.task, work.config.augment)}
    return image_metrics(scores, work.task.test_is_anomaly)


def trained(work: Work) -> Metrics:
    """Both stages as configured."""
    return image_scores(work.trained(), work)


def refilled(work: Work) -> Metrics:
    """As configured, the memories filled with features of the training normals afterwards."""
    config, task = work.config, work.task
    model = work.trained().model
    fill_from_features(model, task.train, task.train_is_normal, config.score.batch_size, config.run.seed)
    return image_scores(fitted(model, work), work)


def untrained(work: Work) -> Metrics:
    """The same encoder without a gradient step, batch-norm statistics calibrated, memories filled with its features."""
    return image_scores(control("untrained", work.config, work.task), work)


def labels_late(work: Work) -> Metrics:
    """Stage 1 on the normals alone, stage 2 with the labelled anomalies."""
    config, task = work.config, work.task
    model = work.stage1(picked(task.train, task.train_is_normal.nonzero().flatten().cpu()), None)
    head = head_for(config, model)
    train_stage2(model, head, task.train, task.train_is_normal, config, quiet=True)
    return image_scores(fitted(model, work, head), work)


def fitted(model: AnoMem, work: Work, head: Any = None) -> Scorer:
    """Prior and detector on a model of this cell."""
    task, config = work.task, work.config
    return fit_scorer(
        model,
        task.train,
        task.train_is_normal,
        aligned=task.aligned,
        augment=config.augment,
        config=config.score,
        head=head,
    )


def linear(work: Work) -> Metrics:
    """Linear evaluation of the trained encoder; see `linear_auroc`."""
    model = work.stage1(work.task.train, None)
    return {"linear": {"auroc": linear_auroc(model, work)}}


def linear_untrained(work: Work) -> Metrics:
    """Linear evaluation of the encoder without a gradient step, batch-norm statistics calibrated."""
    model, task = work.model(), work.task
    calibrate_untrained(model, task.train, task.train_is_normal, work.config.score.batch_size, work.config.run.seed)
    return {"linear": {"auroc": linear_auroc(model, work)}}


def linear_auroc(model: AnoMem, work: Work) -> float:
    """AUROC of a linear classifier on the frozen features of stage 1 (docs/results/README.md has the protocol).

    Args:
        model: trained on normals alone.
        work: whose class is told from all others.

    Raises:
        UserError: scikit-learn is not installed.
    """
    with optional("linear evaluation"):
        from sklearn.linear_model import LogisticRegression
    config = work.config
    ratio = LABELLED_RATIO.get(config.data.dataset, 1.0)
    task = scaled_task(load_task(replace(config.data, outlier_ratio=ratio)), work.cell.scale, work.cell.seed)
    task = task.to(model.device)
    train, test = (pooled_features(model, images, config.score.batch_size) for images in (task.train, task.test))
    mean, spread = train.mean(0), train.std(0).clamp_min(1e-12)
    classifier = LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000)
    classifier.fit(((train - mean) / spread).numpy(), (~task.train_is_normal).cpu().numpy())
    odds = torch.from_numpy(classifier.decision_function(((test - mean) / spread).numpy()))
    return auroc(odds, task.test_is_anomaly.cpu())


@torch.no_grad()
def pooled_features(model: AnoMem, images: Images, batch_size: int) -> Tensor:
    """Maps of all scales averaged over their positions, joined: [N, Σ C_s] float64 on the CPU."""
    model.eval()
    parts = [
        torch.cat([m.double().mean((2, 3)) for m in model(batch)], dim=1).cpu()
        for batch, _ in images.batches(torch.arange(len(images)), batch_size)
    ]
    return torch.cat(parts)


def figure5(work: Work) -> Metrics:
    """Overlap of the trained model, its scores, and the t-SNE."""
    scorer = work.trained()
    return {**_overlap(scorer, work), **image_scores(scorer, work)}


def figure5_untrained(work: Work) -> Metrics:
    """The same of the untrained control."""
    scorer = control("untrained", work.config, work.task)
    return {**_overlap(scorer, work), **image_scores(scorer, work)}


def _overlap(scorer: Scorer, work: Work) -> Metrics:
    from anomem.plots import tsne

    memory, is_anomaly = scorer.model.memories[-1], work.task.test_is_anomaly.cpu()
    vectors = last_scale(scorer, work.task.test, work.cell.seed)
    stored = normalize_rows(memory.prototypes.detach(), memory.normalize).cpu()
    normal, anomalous = vectors[~is_anomaly], vectors[is_anomaly]
    found = overlap(stored, normal, anomalous)
    title = (
        f"{work.task.name}, {work.cell.setting}: overlap of normals {found['normals']:.1%}, of anomalies "
        f"{found['anomalies']:.1%}, by chance {found['chance']:.1%}"
    )
    tsne(stored, normal, anomalous, work.picture, seed=work.cell.seed, title=title)
    return {"overlap": found}


@torch.no_grad()
def last_scale(scorer: Scorer, images: Images, seed: int) -> Tensor:
    """The vector of the last scale at one random position of each image, normalised as its memory does.

    A prototype stands for vectors of single positions: a mean over positions lies elsewhere.

    Args:
        scorer: gives the model.
        images: N images on its device.
        seed: of the positions.

    Returns:
        [N, d] on the CPU.
    """
    model, memory = scorer.model, scorer.model.memories[-1]
    source, parts = torch.Generator().manual_seed(seed), []
    for batch, _ in images.batches(torch.arange(len(images)), scorer.config.batch_size):
        query = model.queries(model(batch))[-1].cpu()  # [b, P, d]
        position = torch.randint(query.shape[1], (len(query),), generator=source)
        parts.append(normalize_rows(query[torch.arange(len(query)), position], memory.normalize))
    return torch.cat(parts)


def overlap(prototypes: Tensor, normal: Tensor, anomalous: Tensor) -> dict[str, float]:
    """Figure 5 as a number, by cosine distance.

    Args:
        prototypes: [M, d], normalised as the memory normalises them.
        normal: [N, d] vectors of normal test samples.
        anomalous: [A, d] vectors of anomalous ones.

    Returns:
        "normals": share of the normals whose nearest neighbour among prototypes and anomalies is a prototype;
        "anomalies": the same of the anomalies, each left out of its own neighbours; "chance": M / (M + A).
    """
    groups = [torch.nn.functional.normalize(x.double(), dim=1) for x in (prototypes, normal, anomalous)]
    stored, normals, anomalies = groups
    to_prototype = (normals @ stored.T).amax(dim=1)
    among = anomalies @ anomalies.T
    among.fill_diagonal_(-math.inf)
    return {
        "normals": float((to_prototype > (normals @ anomalies.T).amax(dim=1)).double().mean()),
        "anomalies": float(((anomalies @ stored.T).amax(dim=1) > among.amax(dim=1)).double().mean()),
        "chance": len(stored) / (len(stored) + len(anomalies)),
    }


def backbone(work: Work) -> Metrics:
    """Scores, parameters and the time of a step."""
    scores = trained(work)
    wall, busy = seconds_per_step(work.config, work.task)
    cost = {"parameters": float(parameter_count(work.model().encoder)), "seconds": wall, "cpu_seconds": busy}
    return {**scores, "cost": cost}


def margins(work: Work) -> Metrics:
    """One stage 1, then stage 2 with every fixed M and with the adaptive one."""
    config, task = work.config, work.task
    model = work.stage1(task.train, task.train_is_normal)
    found: Metrics = {}
    choices = {f"M = {m:g}": replace(config.stage2, margin=m) for m in MARGINS}
    choices["adaptive"] = replace(config.stage2, adaptive=True)
    for name, stage2 in choices.items():
        changed = replace(config, stage2=stage2)
        head = head_for(changed, model)
        train_stage2(model, head, task.train, task.train_is_normal, changed, quiet=True)
        with torch.no_grad():
            batches = task.test.batches(torch.arange(len(task.test)), config.score.batch_size)
            scores = torch.cat([head(model.deviations(model(batch))).cpu() for batch, _ in batches])
        found[name] = {"auroc": auroc(scores, task.test_is_anomaly.cpu())}
    one_class = image_scores(fitted(model, work), work)
    return {**found, **{name: one_class[name] for name in ("plain", "detector")}}


def localised(work: Work) -> Metrics:
    """The small encoder trained on the class: AUROC of the scores; pixel AUROC, AUPRO and AUPIMO of the maps."""
    scorer = work.trained()
    scored = score_images(scorer, work.task.test)
    return _with_maps(scored.scores, scored.maps, "detector", "detector", work)


def fitted_localised(work: Work) -> Metrics:
    """A frozen encoder with filled memories (`anomem fit`): the score that decides, and the maps of "local"."""
    run = RunConfig(seed=work.cell.seed, device=work.config.run.device)
    normals = picked(work.task.train, work.task.train_is_normal.nonzero().flatten().cpu())
    detector = fit(normals, aligned=work.task.aligned, config=FitConfig(run=run))
    found = detector.over(work.task.test)
    return _with_maps(found.scores, found.maps, detector.lead, "local", work)


def _with_maps(scores: dict[str, Tensor], maps: dict[str, Tensor], lead: str, located: str, work: Work) -> Metrics:
    """Every image score; "lead" is the one that decides, with the measures of the maps named `located`."""
    task, missing = work.task, undefined_measures(work.task)
    found = image_metrics(scores, task.test_is_anomaly)
    found["lead"] = dict(found[lead])
    if task.test_masks is not None and "pixel_auroc" not in missing:
        masks = task.test_masks.cpu()
        for name, measure in (("pixel_auroc", pixel_auroc), ("aupro", aupro), ("aupimo", aupimo)):
            # AUPIMO needs normal images and scikit-image is needed for AUPRO.
            defined = name not in missing and (name != "aupimo" or bool((~task.test_is_anomaly).any()))
            if defined:
                found["lead"][name] = measure(maps[located], masks)
    return found
