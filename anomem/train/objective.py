"""The loss of stage 1, Eq. (4), and the figures that are logged with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anomem import functional as F
from anomem.backends import Impl
from anomem.models import AnoMem
from anomem.nn import ContrastedMemoryLoss
from anomem.train.config import LossConfig
from anomem.validation import require, require_count


def scale_criterion(config: LossConfig, impl: Impl) -> ContrastedMemoryLoss:
    """The bracket of Eq. (4) as configured.

    Args:
        config: of the loss.
        impl: implementation behind the operators.

    Raises:
        ArgumentError: a setting no run can use, a sampling that leaves a scale without positions among them.
    """
    require(0 < config.ratio <= 1, "loss.ratio", "a part of the positions in (0, 1]", config.ratio)
    require_count(config.max_positions, "loss.max_positions", 1)
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
        generator: source of randomness; its device is that of the positions.

    Returns:
        S tensors [n_s] or [2B, n_s], n_s = min(cap, max(1, floor(H_s W_s r))).
    """
    per_image = batch if config.positions_per_image else None
    drawn = [
        F.sample_positions(h, w, config.ratio, batch=per_image, generator=generator, device=generator.device)
        for h, w in sizes
    ]
    positions = [p[..., : config.max_positions].contiguous() for p in drawn]
    return [p.repeat(2, 1) for p in positions] if config.positions_per_image else positions


def multi_scale_loss(
    model: AnoMem, criterion: ContrastedMemoryLoss, sampled: Sequence[Tensor], is_normal: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_COM-MS of sampled vectors, Eq. (4).

    Args:
        model: gives memories and lambda_s.
        criterion: the bracket of Eq. (4).
        sampled: S tensors [n_s, 2B, d_s]: first views, then second.
        is_normal: [B] bool, or None when all are normal.

    Returns:
        The loss (0-dim), and each scale's terms as "contrast/<scale>" and "variance/<scale>".
    """
    total = sampled[0].new_zeros((), dtype=torch.float32)
    terms = {}
    scales = zip(model.encoder.names, sampled, model.hopfield, model.scale_weights, strict=True)
    for name, vectors, memory, weight in scales:
        z, z_pair = vectors.chunk(2, dim=1)
        loss, contrast, variance = criterion(z, z_pair, memory, is_normal)
        total = total + weight * loss
        terms[f"contrast/{name}"], terms[f"variance/{name}"] = contrast, variance
    return total, terms


@torch.no_grad()
def memory_figures(model: AnoMem, sampled: Sequence[Tensor]) -> dict[str, Tensor]:
    """How the memories are used by sampled vectors: the figures by which a collapse is seen.

    Args:
        model: gives the memories.
        sampled: S tensors [n_s, 2B, d_s].

    Returns:
        For each scale "perplexity" (over how many prototypes one query spreads), "effective" (how many carry the
        batch) and "mean_length" (of the mean unit retrieval; near 1 every query retrieves the same).
    """
    figures = {}
    for name, vectors, memory in zip(model.encoder.names, sampled, model.hopfield, strict=True):
        use = memory.diagnostics(vectors.float())
        figures[f"perplexity/{name}"] = use.perplexity
        figures[f"effective/{name}"] = use.effective
        figures[f"mean_length/{name}"] = use.mean_length
    return figures


@torch.no_grad()
def fill_memories(model: AnoMem, views: Tensor, is_normal: Tensor | None, generator: torch.Generator) -> None:
    """First prototypes from features of normal images, at every position of every scale.

    Args:
        model: in training mode, so that the features are those of the first step.
        views: [2B, C, H, W].
        is_normal: [B] bool, or None when all are normal.
        generator: source of randomness.
    """
    maps = model(views)
    for query, memory in zip(model.queries(maps), model.hopfield, strict=True):
        normals = query if is_normal is None else query[is_normal.repeat(2)]
        memory.fill(normals.flatten(0, 1).float(), generator)
