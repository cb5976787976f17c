"""One step's input and loss: augmented views, sampled positions, Eq. (4), and the figures that are logged with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.augment import Augmentation, synthesize_outliers
from anomem.functional.distributed import sum_over
from anomem.models import AnoMem
from anomem.nn import ContrastedMemoryLoss
from anomem.rules import Impl
from anomem.train.batches import Batch
from anomem.train.config import LossConfig, TrainConfig
from anomem.train.execution import layout_of
from anomem.train.ranks import ONE, Ranks
from anomem.train.rows import AUGMENT, BLOCK, OUTLIERS, Draws, Rows, blocks


class Views:
    """Makes the views of both stages: adds synthetic outliers if configured, then augments.

    Args:
        config: augmentations, ratio of synthetic outliers, layout.
        is_normal: [N] bool of the training images, on their device; None when all are normal.
        draws: the random numbers of every block of rows.
    """

    def __init__(self, config: TrainConfig, is_normal: Tensor | None, draws: Draws) -> None:
        self.augmentation = Augmentation(config.augment, config.model.impl)
        self.is_normal, self.draws = is_normal, draws
        self.layout = layout_of(config.run)

    def __call__(self, batch: Batch, rows: Rows, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` views of every row, one after another: all rows' first view, then all rows' second.

        Args:
            batch: has the images that the rows need.
            rows: which rows of the batch.
            count: number of views.

        Returns:
            Views [count · R, C, H, W] float in [0, 1], and is_normal [R] bool (None when all are normal); synthetic
            outliers come last.
        """
        x = batch.at(rows.images)
        normal = None if self.is_normal is None else self.is_normal[batch.indices_at(rows.images)]
        if rows.synthetic:
            if normal is None:
                normal = torch.ones(len(x), dtype=torch.bool, device=x.device)
            x = torch.cat([x.float().mul_(1 / 255), *self._outliers(batch, rows)])
            normal = torch.cat([normal, normal.new_zeros(len(rows.outliers))])
        views = self.augmentation.apply(x, *self._drawn(rows, count), self.layout)
        return views, normal

    def _outliers(self, batch: Batch, rows: Rows) -> list[Tensor]:
        """The rows' synthetic outliers, of whole blocks."""
        found = []
        for block in rows.outlier_blocks():
            # The first images are as good as any: the order of a batch is random.
            source = torch.cat(batch.runs([j % rows.batch for j in block])).float().mul_(1 / 255)
            outliers = synthesize_outliers(source, self.draws(OUTLIERS, block.start // BLOCK))
            start, stop = max(block.start, rows.outliers.start), min(block.stop, rows.outliers.stop)
            found.append(outliers[start - block.start : stop - block.start])
        return found

    def _drawn(self, rows: Rows, count: int) -> tuple[Tensor, Tensor]:
        """The augmentation's random numbers for so many views of the rows."""
        uniforms, keys = [], []
        for view in range(count):
            for piece in rows.pieces:
                for number, inside in blocks(piece):
                    uniform, key = self.augmentation.draw(BLOCK, self.draws(AUGMENT, view, number))
                    uniforms.append(uniform[:, inside.start : inside.stop])
                    keys.append(key[inside.start : inside.stop])
        return torch.cat(uniforms, dim=1), torch.cat(keys)


def pairs_of(sampled: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Vectors [n_s, 2B, d_s] of S scales as first and second views, [n_s, B, d_s] each."""
    return [(z, z_pair) for z, z_pair in (vectors.chunk(2, dim=1) for vectors in sampled)]


def scale_criterion(config: LossConfig, impl: Impl, ranks: Ranks = ONE) -> ContrastedMemoryLoss:
    """The bracket of Eq. (4) as configured.

    Args:
        config: of the loss.
        impl: implementation of the operators.
        ranks: the processes whose joint batch is contrasted.
    """
    return ContrastedMemoryLoss(
        config.temperature,
        config.variance_weight,
        negatives=config.negatives,
        symmetric=config.symmetric,
        gather_distributed=ranks.count > 1,
        ring=config.ring,
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
    model: AnoMem,
    criterion: ContrastedMemoryLoss,
    pairs: Sequence[tuple[Tensor, Tensor]],
    is_normal: Tensor | None,
    counts: Sequence[int] | None = None,
    scales: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_COM-MS of sampled vectors, Eq. (4).

    Args:
        model: its memories and lambda_s are used.
        criterion: the bracket of Eq. (4).
        pairs: of each of these scales the first and the second views' vectors, [n_s, B, d_s] each.
        is_normal: [B] bool, or None when all are normal.
        counts: B of each process, where they differ.
        scales: indices; all S scales when not given.

    Returns:
        The loss (0-dim), and each scale's terms as "contrast/<scale>" and "variance/<scale>".
    """
    total = pairs[0][0].new_zeros((), dtype=torch.float32)
    terms = {}
    scales = range(len(pairs)) if scales is None else scales
    found = criterion.of_scales(pairs, [model.memories[scale] for scale in scales], is_normal, counts)
    for scale, (loss, contrast, variance) in zip(scales, found, strict=True):
        name = model.encoder.names[scale]
        total = total + model.scale_weights[scale] * loss
        terms[f"contrast/{name}"], terms[f"variance/{name}"] = contrast, variance
    return total, terms


def scale_backward(
    model: AnoMem,
    criterion: ContrastedMemoryLoss,
    scale: int,
    pair: tuple[Tensor, Tensor],
    is_normal: Tensor | None,
    weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`multi_scale_loss` of one position of one scale, with its backward pass by blocks of the batch.

    Args:
        model: as in `multi_scale_loss`, and so are the criterion and is_normal.
        criterion: contrasts images of one process.
        scale: its index.
        pair: the two views' vectors, [B, d_s] each; their gradients take their place.
        is_normal: [B] bool, or None.
        weight: on the gradients.

    Returns:
        The loss (0-dim) and its terms.
    """
    factor, name = model.scale_weights[scale], model.encoder.names[scale]
    loss, contrast, variance = criterion.backward_by_blocks(
        *pair, model.memories[scale], is_normal, weight=weight * factor
    )
    return factor * loss, {f"contrast/{name}": contrast, f"variance/{name}": variance}


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
def fill_memories(
    model: AnoMem,
    encoded: Iterable[tuple[Rows, list[Tensor]]],
    is_normal: Tensor | None,
    generator: torch.Generator,
    ranks: Ranks = ONE,
) -> None:
    """First prototypes from features of normal images, at every position of every scale.

    A small batch without a normal image gives those of its anomalies: training moves them. The same prototypes are
    drawn whatever the number of processes and micro-batches.

    Args:
        model: its memories are filled.
        encoded: micro-batches of this process's rows, and their maps: S [2R, C_s, H_s, W_s], in training mode, so that
            the features equal those of the first step.
        is_normal: [rows of the whole batch] bool, or None when all are normal.
        generator: source of randomness.
        ranks: the processes that have the other rows.
    """
    allowed: Tensor | None = None
    filled: list[Tensor] = []
    chosen: list[tuple[Tensor, Tensor, Tensor]] = []  # view, place and position of each prototype's feature
    for rows, maps in encoded:
        queries = model.queries(maps)
        if not filled:
            everything = rows.batch + rows.synthetic
            allowed = torch.arange(everything) if is_normal is None else is_normal.cpu().nonzero().flatten()
            allowed = allowed if len(allowed) else torch.arange(everything)
            for query, memory in zip(queries, model.memories, strict=True):
                count, positions = len(memory.prototypes), query.shape[1]
                drawn = _distinct(count, 2 * len(allowed) * positions, generator)
                place = drawn // positions
                chosen.append((place // len(allowed), allowed[place % len(allowed)], drawn % positions))
                filled.append(query.new_zeros(count, query.shape[-1], dtype=torch.float32))
        for piece, offset in zip(rows.pieces, (0, len(rows.images)), strict=True):
            for query, into, (view, place, position) in zip(queries, filled, chosen, strict=True):
                here = ((place >= piece.start) & (place < piece.stop)).nonzero().flatten()
                row = view[here] * len(rows) + place[here] - piece.start + offset
                device = query.device
                into[here.to(device)] = query[row.to(device), position[here].to(device)].float()
    for features, memory in zip(filled, model.memories, strict=True):
        memory.fill(sum_over(features) if ranks.count > 1 else features, generator)


def _distinct(count: int, below: int, generator: torch.Generator) -> Tensor:
    """`count` random numbers [count] int64 on the CPU, distinct where there are enough below the bound."""
    if below <= 16 * count or below <= 1 << 20:
        order = torch.randperm(below, generator=generator, device=generator.device).cpu()
        return order[torch.arange(count) % below]
    # A permutation of all features of a large batch would be larger than the batch.
    drawn = torch.randint(below, (2 * count + 64,), generator=generator, device=generator.device).unique()
    order = torch.randperm(len(drawn), generator=generator, device=generator.device)[:count]
    found: Tensor = drawn[order].cpu()
    return found
