"""One step's input and loss: augmented views, sampled positions, Eq. (4), and the figures that are logged with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.augment import Augmentation, synthesize_outliers
from anomem.backends import Impl
from anomem.models import AnoMem
from anomem.nn import ContrastedMemoryLoss
from anomem.train.config import LossConfig, TrainConfig


class Views:
    """Makes the views of both stages: adds synthetic outliers if configured, then augments.

    Args:
        config: augmentations, ratio of synthetic outliers, layout.
        is_normal: [N] bool of the training images, on their device; None when all are normal.
        generator: source of randomness, on the device of the images.
    """

    def __init__(self, config: TrainConfig, is_normal: Tensor | None, generator: torch.Generator) -> None:
        self.augmentation = Augmentation(config.augment)
        self.is_normal = is_normal
        self.synthetic = config.synthetic_outliers
        self.generator = generator
        self.layout = torch.channels_last if config.run.channels_last else torch.contiguous_format

    def __call__(self, images: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` views of every image, one after another: all images' first view, then all images' second.

        Args:
            images: [b, C, H, W] uint8.
            index: [b], which training images these are.
            count: number of views.

        Returns:
            Views [count · B, C, H, W] float in [0, 1], and is_normal [B] bool (None when all are normal). B is b
            plus the synthetic outliers, which come last.
        """
        x = images.float() / 255
        normal = None if self.is_normal is None else self.is_normal[index]
        # At least one, as with labelled anomalies: stage 2 learns nothing from a batch without.
        outliers = max(1, round(self.synthetic * len(x))) if self.synthetic > 0 else 0
        if outliers:
            if normal is None:
                normal = torch.ones(len(x), dtype=torch.bool, device=x.device)
            # The first images are as good as any: the order of a batch is random.
            source = x.repeat(-(-outliers // len(x)), 1, 1, 1)[:outliers]
            x = torch.cat([x, synthesize_outliers(source, self.generator)])
            normal = torch.cat([normal, normal.new_zeros(outliers)])
        views = torch.cat([self.augmentation(x, self.generator) for _ in range(count)])
        return views.contiguous(memory_format=self.layout), normal


def scale_criterion(config: LossConfig, impl: Impl) -> ContrastedMemoryLoss:
    """The bracket of Eq. (4) as configured.

    Args:
        config: of the loss.
        impl: implementation of the operators.
    """
    return ContrastedMemoryLoss(
        config.temperature,
        config.variance_weight,
        negatives=config.negatives,
        symmetric=config.symmetric,
        impl=impl,
    )


def draw_positions(
    sizes: Sequence[tuple[int, int]],
    config: LossConfig,
    batch: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Sampled positions of every scale (Algorithm 1, line 3), the same for both views.

    Args:
        sizes: (H_s, W_s) of each scale.
        config: ratio, cap, and whether each image has its own.
        batch: B.
        generator: source of randomness, on the device of the positions.

    Returns:
        S tensors [n_s] or [2B, n_s], n_s = min(cap, max(1, floor(H_s W_s r))).
    """
    per_image = batch if config.positions_per_image else None
    positions = [
        AF.sample_positions(h, w, config.ratio, batch=per_image, generator=generator, device=generator.device)
        for h, w in sizes
    ]
    positions = [p[..., : config.max_positions].contiguous() for p in positions]
    return [p.repeat(2, 1) for p in positions] if config.positions_per_image else positions


def multi_scale_loss(
    model: AnoMem, criterion: ContrastedMemoryLoss, sampled: Sequence[Tensor], is_normal: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_COM-MS of sampled vectors, Eq. (4).

    Args:
        model: its memories and lambda_s are used.
        criterion: the bracket of Eq. (4).
        sampled: S tensors [n_s, 2B, d_s]: first views, then second.
        is_normal: [B] bool, or None when all are normal.

    Returns:
        The loss (0-dim), and each scale's terms as "contrast/<scale>" and "variance/<scale>".
    """
    total = sampled[0].new_zeros((), dtype=torch.float32)
    terms = {}
    scales = zip(model.encoder.names, sampled, model.memories, model.scale_weights, strict=True)
    for name, vectors, memory, weight in scales:
        z, z_pair = vectors.chunk(2, dim=1)
        loss, contrast, variance = criterion(z, z_pair, memory, is_normal)
        total = total + weight * loss
        terms[f"contrast/{name}"], terms[f"variance/{name}"] = contrast, variance
    return total, terms


@torch.no_grad()
def memory_figures(model: AnoMem, sampled: Sequence[Tensor]) -> dict[str, Tensor]:
    """How sampled vectors use the memories; the figures show a collapse.

    Args:
        model: its memories are used.
        sampled: S tensors [n_s, 2B, d_s].

    Returns:
        For each scale "perplexity" (number of prototypes over which one query spreads), "effective" (number that
        carries the batch) and "mean_length" (of the mean unit retrieval; 1 when all queries retrieve the same).
    """
    figures = {}
    for name, vectors, memory in zip(model.encoder.names, sampled, model.memories, strict=True):
        use = memory.diagnostics(vectors.float())
        figures[f"perplexity/{name}"] = use.perplexity
        figures[f"effective/{name}"] = use.effective
        figures[f"mean_length/{name}"] = use.mean_length
    return figures


@torch.no_grad()
def fill_memories(model: AnoMem, views: Tensor, is_normal: Tensor | None, generator: torch.Generator) -> None:
    """First prototypes from features of normal images, at every position of every scale.

    A small batch without a normal image gives those of its anomalies: training moves them.

    Args:
        model: in training mode, so that the features equal those of the first step.
        views: [2B, C, H, W].
        is_normal: [B] bool, or None when all are normal.
        generator: source of randomness.
    """
    maps = model(views)
    every = is_normal is None or not bool(is_normal.any())
    for query, memory in zip(model.queries(maps), model.memories, strict=True):
        normals = query if every or is_normal is None else query[is_normal.repeat(2)]
        memory.fill(normals.flatten(0, 1).float(), generator)
