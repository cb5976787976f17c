"""The gradients of one step of stage 1: of a batch at once, or by gradient caching where it is encoded bit by bit.

Gradient caching (Gao et al. 2021, https://arxiv.org/abs/2101.06983): encode micro-batches without a graph, take the
loss's gradient at the sampled vectors, then encode each micro-batch again with a graph and pass its gradient on. Both
passes see the same views, dropout and batch-norm statistics; running averages are updated in the first only. The result
is that of encoding the micro-batches one after another with graphs, and, without batch norm, that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from anomem.data import Images
from anomem.models import AnoMem
from anomem.train.batches import Batch
from anomem.train.config import OptimizerConfig, TrainConfig
from anomem.train.execution import autocast
from anomem.train.network import Network, statistics_kept
from anomem.train.objective import (
    Views,
    draw_positions,
    fill_memories,
    multi_scale_loss,
    pairs_of,
    scale_backward,
    scale_criterion,
)
from anomem.train.ranks import Ranks
from anomem.train.rows import FILL, POSITIONS, Draws, Rows, seed_of
from anomem.validation import require

PIECE = 3 << 18
"""Numbers of the sampled vectors that gradient caching contrasts at once: 3 MiB in float32, and the contrast takes
eleven times that. On a CPU a position that has more is contrasted by blocks."""


class Loss(NamedTuple):
    """Of a step; its gradients are in place."""

    total: Tensor
    """0-dim; its mean over the processes is the batch's."""
    terms: dict[str, Tensor]
    """By name and scale."""
    sampled: list[Tensor]
    """S tensors [n_s, 2R, d_s], of this process's rows."""


def batch_of(images: int, config: OptimizerConfig) -> int:
    """B: a smaller set is one batch.

    Raises:
        ArgumentError: it has too few images for its parts, or fewer than a micro-batch.
    """
    batch, micro = min(config.batch_size, images), config.micro_batch
    expected = "at most half of the images of a batch"
    enough = batch >= 2 * config.accumulate
    require(enough, f"{config.section}.accumulate", expected, lambda: f"{config.accumulate} of {batch}")
    expected = f"at most {batch}, the images of a batch"
    require(micro is None or micro <= batch, f"{config.section}.micro_batch", expected, micro)
    return batch


class Shares:
    """Which rows of a batch this process has: parts of the batch, each with micro-batches.

    Args:
        images: number of training images; a smaller set is one batch.
        config: batch, parts and micro-batches.
        synthetic: outliers per image.
        ranks: the processes.
    """

    def __init__(self, images: int, config: OptimizerConfig, synthetic: float, ranks: Ranks) -> None:
        self.batch = batch_of(images, config)
        self.parts: list[list[Rows]] = []
        """Micro-batches of each part."""
        self.counts: list[list[int]] = []
        """Rows of each process in each part."""
        for part in Rows.of(self.batch, synthetic).split(config.accumulate):
            rows = part.split(ranks.count)
            self.counts.append([len(share) for share in rows])
            most = max(len(share.images) for share in rows)
            # As many in every process: they exchange batch-norm statistics.
            micro = 1 if config.micro_batch is None else -(-most // config.micro_batch)
            self.parts.append(rows[ranks.index].split(min(micro, min(len(share.images) for share in rows) or 1)))
        chunks = [rows for part in self.parts for rows in part]
        # First those of the rows themselves, so that the images of a micro-batch follow each other.
        own = [place for rows in chunks for place in rows.images]
        self.places = list(dict.fromkeys([*own, *(place for rows in chunks for place in rows.sources())]))
        self.at_once = len(chunks) == 1
        """Whether a step reads all its images together."""


class Stage1Step:
    """Computes the gradients of stage 1.

    Attributes:
        shares: which rows are encoded where.
        draws: the random numbers.

    Args:
        model: whose memories and projections are trained.
        network: calls its encoder.
        images: the training images.
        is_normal: [N] bool, or None.
        config: of the run, settled.
        ranks: the processes.
    """

    def __init__(
        self,
        model: AnoMem,
        network: Network,
        images: Images,
        is_normal: Tensor | None,
        config: TrainConfig,
        ranks: Ranks,
        views: type[Views] = Views,
    ) -> None:
        trained = any(p.requires_grad for part in (model.encoder, model.projections) for p in part.parameters())
        expected = "memory, as encoder and projections are frozen and the other view trains no memory"
        require(trained or config.loss.positive != "view", "loss.positive", expected, config.loss.positive)
        self.model, self.network, self.config, self.ranks = model, network, config, ranks
        self.shares = Shares(len(images), config.optimizer, config.synthetic_outliers, ranks)
        self.is_normal = is_normal
        self.draws = Draws(model.device, config.run.seed)
        self.views_of = views(config, is_normal, self.draws)
        self.criterion = scale_criterion(config.loss, config.model.impl, ranks)
        self.exact = model.device.type == "cpu"
        """Whether the contrast is in float32 under autocast: AUROC is then that of float32 (docs/PERFORMANCE.md). A
        GPU's kernels are made for bfloat16; not measured on a GPU yet."""

    def __call__(self, batch: Batch) -> Loss:
        """Gradients of a batch, in `.grad` of all parameters; the loss of its last part."""
        self.draws.begin(batch.step)
        if batch.step == 0 and self.config.prototypes_from == "features":
            self._fill(batch)
        count = len(self.shares.parts)
        for part, chunks in enumerate(self.shares.parts):
            backward = self._at_once if len(chunks) == 1 else self._cached
            loss = backward(batch, part, chunks, part < count - 1)
        self.network.reduce()
        # Without the graph, which would outlive its step.
        terms = {name: term.detach() for name, term in loss.terms.items()}
        return Loss(loss.total.detach(), terms, [vectors.detach() for vectors in loss.sampled])

    def _at_once(self, batch: Batch, part: int, chunks: list[Rows], more: bool) -> Loss:
        (rows,) = chunks
        with record_function("anomem.augment"):
            views, normal = self.views_of(batch, rows, 2)  # [2R, C, H, W], [R]
        with autocast(self.config.run, self.model.device), self.network.more_to_come(more):
            with record_function("anomem.encode"), self._dropout(part, 0):
                maps = self.network(views)
            with record_function("anomem.contrast"):
                # Drawn here, not in the kernels: every implementation then contrasts the same pairs.
                sampled = self._in_precision(self._sample(maps, part, rows))
                loss, terms = self._loss(pairs_of(sampled), normal, part)
        with record_function("anomem.backward"), self.network.more_to_come(more):
            (loss / len(self.shares.parts)).backward()
        return Loss(loss, terms, sampled)

    def _cached(self, batch: Batch, part: int, chunks: list[Rows], more: bool) -> Loss:
        held, flags = SampledVectors(sum(len(rows) for rows in chunks)), []
        first = 0
        with torch.no_grad():
            for number, rows in enumerate(chunks):
                sampled, normal = self._sampled(batch, part, rows, number)
                held.write(sampled, first)
                flags.append(normal)
                first += len(rows)
        normal = None if flags[0] is None else torch.cat([flag for flag in flags if flag is not None])
        loss, terms = self._contrasted(held.scales, normal, part)
        first = 0
        with statistics_kept(self.network.encoder):
            for number, rows in enumerate(chunks):
                gradients = held.read(first, len(rows))
                last = number == len(chunks) - 1 and not more
                with self.network.more_to_come(not last):
                    sampled, _ = self._sampled(batch, part, rows, number)
                    # Without those of frozen scales.
                    pairs = [pair for pair in zip(sampled, gradients, strict=True) if pair[0].requires_grad]
                    if pairs:
                        with record_function("anomem.backward"):
                            torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])
                held.write(sampled, first)
                first += len(rows)
        return Loss(loss, terms, held.scales)

    def _contrasted(self, scales: list[Tensor], normal: Tensor | None, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and terms of the vectors of all scales [n_s, 2R, d_s]; their gradients take their place."""
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        for pieces in self._pieces(scales):
            by_blocks = self._by_blocks(scales[pieces[0][0]])
            contrasted = self._contrasted_by_blocks if by_blocks else self._contrasted_pieces
            loss, found = contrasted(scales, pieces, normal, part)
            losses.append(loss)
            for name, term in found.items():
                terms[name] = term + terms.get(name, 0.0)
        return sum(losses[1:], losses[0]), terms

    def _contrasted_pieces(
        self, scales: list[Tensor], pieces: list[tuple[int, slice]], normal: Tensor | None, part: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of loss and terms, 0-dim each, of one entry of `_pieces`; gradients take the place of its vectors.

        A call of its own, so that leaves and gradients [n, R, d_s] are gone before those of the next entry.
        """
        held = pairs_of([scales[scale][positions].detach() for scale, positions in pieces])
        pairs = [(self._leaf(z), self._leaf(z_pair)) for z, z_pair in held]
        # Pieces of several scales are whole ones.
        share = len(pairs[0][0]) / len(scales[pieces[0][0]])
        with autocast(self.config.run, self.model.device), record_function("anomem.contrast"):
            loss, found = self._loss(pairs, normal, part, [scale for scale, _ in pieces])
        with record_function("anomem.backward"):
            (loss * (share / len(self.shares.parts))).backward()
        for views, leaves in zip(held, pairs, strict=True):
            for view, leaf in zip(views, leaves, strict=True):
                assert leaf.grad is not None  # the loss depends on every vector
                view.copy_(leaf.grad)
        return share * loss.detach(), {name: share * term.detach() for name, term in found.items()}

    def _contrasted_by_blocks(
        self, scales: list[Tensor], pieces: list[tuple[int, slice]], normal: Tensor | None, part: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of one position, in memory that the batch adds little to."""
        ((scale, position),) = pieces
        (vectors,) = scales[scale][position].detach()  # [2R, d_s]
        z, z_pair = vectors.chunk(2)
        share = 1 / len(scales[scale])
        with record_function("anomem.contrast"), torch.autocast("cpu", enabled=False):
            loss, found = scale_backward(
                self.model,
                self.criterion,
                scale,
                (z, z_pair),
                self._contrasted_as_normal(normal, z),
                share / len(self.shares.parts),
            )
        return share * loss, {name: share * term for name, term in found.items()}

    def _by_blocks(self, vectors: Tensor) -> bool:
        """Whether the positions of a scale [n, 2R, d] are contrasted by blocks."""
        alone = self.ranks.count == 1 and self.config.loss.negatives == "image"
        return self.exact and alone and vectors[0].numel() > PIECE

    def _leaf(self, vectors: Tensor) -> Tensor:
        """The vectors [n, R, d] in the precision of the contrast, for their gradient."""
        return self._in_precision([vectors])[0].detach().requires_grad_()

    def _pieces(self, scales: list[Tensor]) -> list[list[tuple[int, slice]]]:
        """What is contrasted at once: a scale and its positions.

        A scale's loss is the mean over its positions, unless each is a negative of the others. Several processes take
        everything at once: scales share their messages.
        """
        if self.ranks.count > 1:
            return [[(scale, slice(None)) for scale in range(len(scales))]]
        pieces = []
        for scale, (positions, rows, d) in enumerate(x.shape for x in scales):
            together = self.config.loss.negatives != "image"
            count = positions if together else max(1, min(positions, PIECE // max(1, rows * d)))
            pieces += [[(scale, slice(first, first + count))] for first in range(0, positions, count)]
        return pieces

    def _sampled(self, batch: Batch, part: int, rows: Rows, chunk: int) -> tuple[list[Tensor], Tensor | None]:
        """The sampled vectors of a micro-batch, the same each time."""
        with record_function("anomem.augment"):
            views, normal = self.views_of(batch, rows, 2)
        with autocast(self.config.run, self.model.device), record_function("anomem.encode"):
            with self._dropout(part, chunk):
                maps = self.network(views)
            return self._sample(maps, part, rows), normal

    def _sample(self, maps: Sequence[Tensor], part: int, rows: Rows) -> list[Tensor]:
        """The vectors to be contrasted, S × [n, 2R, d], in the encoder's precision."""
        return self.model.sample(maps, self._positions(part, rows))

    def _in_precision(self, vectors: list[Tensor]) -> list[Tensor]:
        """The vectors in the precision of the contrast."""
        return [x.float() if x.dtype == torch.bfloat16 else x for x in vectors] if self.exact else vectors

    def _loss(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        normal: Tensor | None,
        part: int,
        scales: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the vectors of all scales or of those given, two views [n, R, d] each."""
        normal = self._contrasted_as_normal(normal, pairs[0][0][0])
        counts = self.shares.counts[part] if self.ranks.count > 1 else None
        with torch.autocast("cpu", enabled=False) if self.exact else nullcontext():
            return multi_scale_loss(self.model, self.criterion, pairs, normal, counts, scales)

    def _contrasted_as_normal(self, normal: Tensor | None, vectors: Tensor) -> Tensor | None:
        """[R] bool, the rows of these vectors [R, d] that the memory answers; None for all."""
        if self.config.loss.positive == "view":
            return torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        return normal

    def _positions(self, part: int, rows: Rows) -> list[Tensor]:
        """The sampled positions of a part, of both views of these rows where each image has its own."""
        whole = rows.batch + rows.synthetic
        drawn = draw_positions(self.model.encoder.sizes, self.config.loss, whole, self.draws(POSITIONS, part))
        if not self.config.loss.positions_per_image:
            return drawn
        own = [torch.cat([p[piece.start : piece.stop] for piece in rows.pieces]) for p in drawn]
        return [p.repeat(2, 1) for p in own]

    def _fill(self, batch: Batch) -> None:
        """The first prototypes, under autocast so that they have the precision of the first queries."""
        rows = [chunk for part in self.shares.parts for chunk in part]
        normal = self._normal_rows(batch)

        def encoded() -> Iterator[tuple[Rows, list[Tensor]]]:
            for number, chunk in enumerate(rows):
                views, _ = self.views_of(batch, chunk, 2)
                with autocast(self.config.run, self.model.device), self._dropout(0, number):
                    yield chunk, self.network(views)

        with torch.no_grad(), autocast(self.config.run, self.model.device):
            source = torch.Generator(self.model.device).manual_seed(seed_of(FILL, self.config.run.seed))
            fill_memories(self.model, encoded(), normal, source, self.ranks)

    def _normal_rows(self, batch: Batch) -> Tensor | None:
        """[rows of the whole batch] bool, from all processes; None when all are normal."""
        chunks = [chunk for part in self.shares.parts for chunk in part]
        if self.is_normal is None and not chunks[0].synthetic:
            return None
        flags = torch.zeros(chunks[0].batch + chunks[0].synthetic, device=self.model.device)
        for rows in chunks:
            piece = rows.images
            own = 1.0 if self.is_normal is None else self.is_normal[batch.indices_at(piece)].float()
            flags[piece.start : piece.stop] = own
        return self.ranks.mean(flags) > 0

    def _dropout(self, part: int, chunk: int) -> AbstractContextManager[None]:
        return self.draws.dropout(part, chunk, self.ranks.index)


class SampledVectors:
    """The sampled vectors of all micro-batches, in one tensor for each scale: all that is kept between the two passes.

    Attributes:
        scales: S tensors [n_s, 2R, d_s], first views and then second; none before the first `write`.

    Args:
        rows: R.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.scales: list[Tensor] = []

    def write(self, vectors: Sequence[Tensor], first: int) -> None:
        """Keep the vectors of a micro-batch, S × [n_s, 2r, d_s], whose first image is this one."""
        if not self.scales:
            self.scales = [x.new_empty(x.shape[0], 2 * self.rows, x.shape[2]) for x in vectors]
        for scale, x in zip(self.scales, vectors, strict=True):
            for view, here in zip(scale.chunk(2, dim=1), x.detach().chunk(2, dim=1), strict=True):
                view[:, first : first + here.shape[1]] = here

    def read(self, first: int, count: int) -> list[Tensor]:
        """A micro-batch of `count` images, S × [n_s, 2 · count, d_s]."""
        return [torch.cat([view[:, first : first + count] for view in x.chunk(2, dim=1)], dim=1) for x in self.scales]
