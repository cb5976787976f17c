"""Filling a model's memories from all normals, and the scores that suit a filled memory."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anomem import functional as AF
from anomem.models import AnoMem
from anomem.nn import HopfieldMemory
from anomem.reference.retrieve import Normalize, normalize_rows
from anomem.scoring.detector import Alignment, Gaussians, MomentSums
from anomem.scoring.fill import FeatureRows, fill_prototypes, prototype_count
from anomem.scoring.labelled import pooled_deviations
from anomem.scoring.learn import Method, learn_prototypes
from anomem.validation import require, require_choice, require_count

ImageBatches = Callable[[], Iterable[Tensor]]
"""Gives, each time it is called, the same batches of normal images [b, C, H, W]."""
HELD_BYTES = 2**30
"""Of features that are held instead of encoded again."""
TOP_K = 8
"""Prototypes that a feature of a filled memory reads."""
PARTS = ("plain", "local", "whole")
"""Scores of which the others are made."""
SPREADS = ("local_spread", "whole_spread", "map_spread", "plain_map_spread")
"""Of the scales, [S] each."""
TOP_PART = 0.1
"""Of the positions, the largest distances first: their mean is an image's distance."""


class NormalQueries:
    """The queries of normal images at all scales, which filling and fitting read three times.

    They are encoded once and held where they fit, else encoded again each time.

    Args:
        model: put into eval mode.
        batches: of normal images.
        at_most: bytes to hold.

    Yields:
        For each batch S tensors [b, P_s, d_s].
    """

    def __init__(self, model: AnoMem, batches: ImageBatches, at_most: int = HELD_BYTES) -> None:
        self.model, self.batches, self.at_most = model.eval(), batches, at_most
        self._held: list[list[Tensor]] | None = None

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[Tensor]]:
        if self._held is not None:
            yield from self._held
            return
        held: list[list[Tensor]] | None = []
        size = 0
        for images in self.batches():
            queries = [query.float() for query in self.model.queries(self.model(images))]
            size += sum(query.nbytes for query in queries)
            if held is not None:
                held = [*held, queries] if size <= self.at_most else None
            yield queries
        self._held = held


class FilledScale(NamedTuple):
    """What one memory was filled with."""

    name: str
    """Of the scale."""
    rows: int
    """Features of normals seen."""
    prototypes: int
    """M."""
    seconds: float
    """Taken by the choice."""


@torch.no_grad()
def fill_memories(
    model: AnoMem,
    queries: Iterable[Sequence[Tensor]],
    prototypes: Sequence[float],
    method: Method = "kmeans",
    *,
    seed: int = 0,
    at_most: int = 400_000,
    part: float = 1.0,
) -> list[FilledScale]:
    """Replace the prototypes of every memory by ones chosen among the features of all normals.

    The memories change their size where M differs from what they have. Retrieval normalises prototypes as it normalises
    queries, so the features are normalised before the choice.

    Args:
        model: its encoder is not changed.
        queries: of all normals, `NormalQueries`; read once.
        prototypes: one number for all scales, or one per scale: M, or a ratio in (0, 1) of the features. A number above
            that of the features takes all of them.
        method: see `fill_prototypes`; "learned" moves k-means centres by `learn_prototypes`.
        seed: see `fill_prototypes`.
        at_most: features held per scale; of more, a random choice.
        part: of the features that a memory may have as prototypes, in (0, 1].

    Raises:
        ArgumentError: no image, a wrong number, or memories with separate values, which could not be filled.
    """
    scales = len(model.memories)
    wanted = list(prototypes) * scales if len(prototypes) == 1 else list(prototypes)
    require(len(wanted) == scales, "prototypes", f"one number, or {scales}, one per scale", list(prototypes))
    separate = any(memory.values is not None for memory in model.memories)
    require(not separate, "separate_values", "False: a filled memory returns its prototypes", True)
    collected = [FeatureRows(at_most, seed) for _ in range(scales)]
    for of_batch in queries:
        for rows, query, memory in zip(collected, of_batch, model.memories, strict=True):
            rows.add(normalize_rows(query.flatten(0, 1).float(), memory.normalize))
    filled = []
    for name, held, count, memory in zip(model.encoder.names, collected, wanted, model.memories, strict=True):
        begin = time.perf_counter()
        features = held.rows()
        choice = "kmeans" if method == "learned" else method
        most = max(1, int(part * len(features)))
        chosen = fill_prototypes(features, min(prototype_count(count, len(features)), most), choice, seed=seed)
        if method == "learned":
            beta, normalize = float(memory.beta), memory.normalize
            chosen = learn_prototypes(features, chosen, beta=beta, normalize=normalize, seed=seed)
        memory.prototypes = nn.Parameter(chosen.to(memory.prototypes), requires_grad=memory.prototypes.requires_grad)
        filled.append(FilledScale(name, held.seen, len(chosen), time.perf_counter() - begin))
    return filled


class FilledScores(NamedTuple):
    """Scores and maps of B images; higher is more anomalous."""

    scores: dict[str, Tensor]
    """"plain", "local", "whole", "both" and "either" -> [B]; see `FilledScorer`."""
    maps: dict[str, Tensor]
    """"plain" and "local" -> [B, H, W] at the images' size."""
    pooled: Tensor | None = None
    """[B, 2·Σ d_s], mean of D and of abs(D) over positions, for `anomem.scoring.labelled`, where it was asked for."""


class FilledScorer(nn.Module):
    """A frozen model with filled memories and what was fitted to its deviations; one retrieval per scale and image.

    The memory compares normalised features. Its deviation is brought back to the feature's own units before anything is
    fitted: D(s) = σ(z) (norm(z) − HF(z)), σ(z) its standard deviation (its length for "l2"). On solar cells the
    Gaussians rank better with it (docs/RESULTS.md).

    * "plain": Σ lambda_s top 1 − cos(z, HF(z)), where top is the mean over the largest tenth of the positions.
    * "local": Mahalanobis distance of D(s) at every position, pooled by the top: local defects on aligned parts.
    * "whole": Mahalanobis distance of the mean of D(s) over positions: another material, another object.
    * "both": "plain" and "local", each relative to its mean and spread over the fitted normals (`measure_by`: over
      others), added.
    * "either": the larger of "local" and "whole", each relative to its mean and spread.

    Each scale of "local" and "whole" is divided by its spread over the fitted normals; so are the scales of the maps.

    Args:
        model: memories filled.
        alignment: "per_position" fits one Gaussian per position, "pooled" one for all.
        top_part: part of the positions that are pooled, in (0, 1]; at least one position.
        top_k: prototypes that a feature reads, those with the largest scores; all when None.

    Shape:
        images [B, C, H, W] -> `FilledScores`.

    Example:
        >>> normals = NormalQueries(model, batches)
        >>> fill_memories(model, normals, [1024])
        >>> scorer = FilledScorer(model, "per_position")
        >>> scorer.fit(normals)
        >>> scores, maps, _ = scorer(images)  # "both" -> [B], "local" -> [B, H, W]
    """

    local_spread: Tensor
    whole_spread: Tensor
    map_spread: Tensor
    plain_map_spread: Tensor
    centre: Tensor
    spread: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self, model: AnoMem, alignment: Alignment, top_part: float = TOP_PART, top_k: int | None = TOP_K
    ) -> None:
        super().__init__()
        require_choice(alignment, "alignment", ("per_position", "pooled"))
        require(0 < top_part <= 1, "top_part", "a part in (0, 1]", top_part)
        if top_k is not None:
            require_count(top_k, "top_k", 1)
        self.model, self.alignment, self.top_part, self.top_k = model, alignment, top_part, top_k
        positions = [h * w for h, w in model.encoder.sizes]
        widths = [memory.prototypes.shape[1] for memory in model.memories]
        pooled = alignment == "pooled"
        self.local = nn.ModuleList([Gaussians(1 if pooled else p, d) for p, d in zip(positions, widths, strict=True)])
        self.whole = nn.ModuleList([Gaussians(1, d) for d in widths])
        for name in SPREADS:
            self.register_buffer(name, torch.ones(len(widths)))
        self.register_buffer("centre", torch.zeros(3))  # of "plain", "local" and "whole"
        self.register_buffer("spread", torch.ones(3))
        interpolation = _interpolation(model.encoder.sizes, model.encoder.image_size)
        for name, matrix in zip(("rows", "columns"), interpolation, strict=True):
            self.register_buffer(name, matrix, persistent=False)
        self.to(model.mean.device)
        self.eval()

    @property
    def lead(self) -> str:
        """The score to look at first: "both" where positions are aligned, else "either"."""
        return "both" if self.alignment == "per_position" else "either"

    @torch.no_grad()
    def fit(self, queries: Iterable[Sequence[Tensor]]) -> None:
        """Fit Gaussians and spreads to normal images in two passes.

        A Gaussian is nearer to the images it was fitted to than to others, the more so the fewer they are and the more
        channels a scale has. The spreads are therefore those of each half of the images (every other one) under
        Gaussians fitted to the other half, where a half is at least two; what scores new images is fitted to all.

        Args:
            queries: of all normals, `NormalQueries`; read twice.

        Raises:
            ArgumentError: fewer than two images.
        """
        halves = [_Moments(self.local, self.whole), _Moments(self.local, self.whole)]
        seen = 0
        for of_batch in queries:
            deviations = self._deviations(of_batch)[1]
            for i, half in enumerate(halves):
                half.update([d[(i + seen) % 2 :: 2] for d in deviations])
            seen += len(of_batch[0])
        require(seen >= 2, "images", "at least two normals to fit a Gaussian", seen)
        everything = halves[0].joined(halves[1])
        judges = [half.gaussians() for half in (halves if seen >= 4 else [everything, everything])]
        self._fit_spreads(queries, judges)
        for gaussians, sums in zip([*self.local, *self.whole], everything.sums, strict=True):
            assert isinstance(gaussians, Gaussians)
            gaussians.fit(sums)

    def _fit_spreads(self, queries: Iterable[Sequence[Tensor]], judges: Sequence[Sequence[Gaussians]]) -> None:
        """From the distances of the images of one half as the other half's Gaussians give them."""
        local, whole, means, plain_means, plain, seen = [], [], [], [], [], 0
        scales = len(self.local)
        for of_batch in queries:
            cosines, deviations = self._deviations(of_batch)
            plain.append(self._plain(cosines))
            plain_means.append(torch.stack([c.mean(dim=1) for c in cosines]))
            for i in range(2):
                part = [d[(i + seen) % 2 :: 2] for d in deviations]
                if not len(part[0]):
                    continue
                judge = judges[1 - i]
                maps = [g(d) for g, d in zip(judge[:scales], part, strict=True)]
                local.append(torch.stack([self._top(m) for m in maps]))
                means.append(torch.stack([m.mean(dim=1) for m in maps]))
                pairs = zip(judge[scales:], part, strict=True)
                whole.append(torch.stack([g(d.mean(dim=1, keepdim=True))[:, 0] for g, d in pairs]))
            seen += len(of_batch[0])
        for buffer, parts in (
            (self.local_spread, local),
            (self.whole_spread, whole),
            (self.map_spread, means),
            (self.plain_map_spread, plain_means),
        ):
            buffer.copy_(_spread(torch.cat(parts, dim=1)))
        scores = [torch.cat(plain)]
        for parts, spread in ((local, self.local_spread), (whole, self.whole_spread)):
            scores.append((torch.cat(parts, dim=1) / spread[:, None]).sum(dim=0))
        self.centre.copy_(torch.stack([x.mean() for x in scores]))
        self.spread.copy_(torch.cat([_spread(x[None]) for x in scores]))

    def joined(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scores "plain", "local" and "whole" [B] with "both" and "either" made of them."""
        parts = torch.stack([scores[name] for name in PARTS])
        relative = (parts - self.centre.to(parts.device)[:, None]) / self.spread.to(parts.device)[:, None]
        both, either = relative[:2].sum(dim=0), relative[1:].amax(dim=0)
        return {**{name: scores[name] for name in PARTS}, "both": both, "either": either}

    def spreads_from(self, other: FilledScorer) -> None:
        """Weigh the scales, in scores and maps, as another scorer does: one that was fitted to other normals."""
        for name in SPREADS:
            self.get_buffer(name).copy_(other.get_buffer(name))

    def measure_by(self, scores: Mapping[str, Tensor]) -> None:
        """Take mean and spread of "plain", "local" and "whole" from normals that were not fitted.

        Args:
            scores: of each, [N] with N ≥ 2.
        """
        parts = torch.stack([scores[name] for name in PARTS])
        self.centre.copy_(parts.mean(dim=1))
        self.spread.copy_(_spread(parts))

    @torch.no_grad()
    def forward(self, images: Tensor) -> FilledScores:
        """See the class."""
        return self.of_queries(self.model.queries(self.model(images)), (images.shape[2], images.shape[3]))

    @torch.no_grad()
    def of_queries(self, queries: Sequence[Tensor], size: tuple[int, int], pooled: bool = False) -> FilledScores:
        """Scores and maps of images that are encoded already.

        Args:
            queries: S tensors [B, P_s, d_s].
            size: (H, W) of the maps.
            pooled: also give the pooled deviations.
        """
        cosines, normalized, units = self._reads(queries)
        distances = [g(d, unit) for g, d, unit in zip(self.local, normalized, units, strict=True)]
        plain = self._plain(cosines)
        local = sum(self._top(d) / spread for d, spread in zip(distances, self.local_spread, strict=True))
        whole = sum(d / spread for d, spread in zip(self._whole(normalized, units), self.whole_spread, strict=True))
        assert isinstance(local, Tensor)
        assert isinstance(whole, Tensor)
        return FilledScores(
            self.joined({"plain": plain, "local": local, "whole": whole}),
            self._maps(
                {"plain": (cosines, self.plain_map_spread), "local": (distances, self.map_spread)},
                size,
            ),
            pooled_deviations(_in_units(normalized, units)) if pooled else None,
        )

    @torch.no_grad()
    def pooled_deviations(self, images: Tensor) -> Tensor:
        """Mean of D and abs(D) over positions, for `anomem.scoring.labelled`: [B, 2·Σ d_s]."""
        return pooled_deviations(self._deviations(self.model.queries(self.model(images)))[1])

    def _deviations(self, queries: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """1 − cos(z, HF(z)) and D(s) at all positions, S tensors [B, P_s] and [B, P_s, d_s], from one retrieval."""
        cosines, normalized, units = self._reads(queries)
        return cosines, _in_units(normalized, units)

    def _reads(self, queries: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As `_deviations`, with D(s) as norm(z) − HF(z) [B, P_s, d_s] and its unit σ(z) [B, P_s, 1]."""
        memories = self.model.memories
        reads = [_read(query, memory, self.top_k) for query, memory in zip(queries, memories, strict=True)]
        units = [_divisor(query.float(), memory.normalize) for query, memory in zip(queries, memories, strict=True)]
        return [cosine for cosine, _ in reads], [deviation for _, deviation in reads], units

    def _plain(self, cosines: Sequence[Tensor]) -> Tensor:
        """Σ lambda_s top of the cosine distances: S tensors [B, P_s] -> [B]."""
        pooled = [w * self._top(c) for w, c in zip(self.model.scale_weights, cosines, strict=True)]
        return torch.stack(pooled).sum(dim=0)

    def _top(self, distances: Tensor) -> Tensor:
        """Mean over the largest: [B, P] -> [B]."""
        count = max(1, int(distances.shape[1] * self.top_part))
        return distances.topk(count, dim=1).values.mean(dim=1)

    def _whole(self, normalized: Sequence[Tensor], units: Sequence[Tensor]) -> list[Tensor]:
        """S tensors [B]."""
        means = [unit.mT @ d / d.shape[1] for d, unit in zip(normalized, units, strict=True)]  # [B, 1, d_s]
        return [g(mean)[:, 0] for g, mean in zip(self.whole, means, strict=True)]

    def _maps(self, found: Mapping[str, tuple[Sequence[Tensor], Tensor]], size: tuple[int, int]) -> dict[str, Tensor]:
        """Scales divided by their spread, brought to the image's size and added.

        Args:
            found: by name, S tensors [B, P_s] and the spreads [S].
            size: (H, W).

        Returns:
            By name, [B, H, W].
        """
        # torch's upsampling is several times slower. Scales of one size are added first.
        small: dict[tuple[int, int], Tensor] = {}
        for s, shape in enumerate(self.model.encoder.sizes):
            scale = torch.stack([distances[s] / spread[s] for distances, spread in found.values()])  # [maps, B, P_s]
            small[shape] = small[shape] + scale if shape in small else scale
        rows, columns = self.rows, self.columns
        exporting = torch.compiler.is_exporting()  # a size may be dynamic, and no comparison may fix it
        if exporting or size != self.model.encoder.image_size:
            rows, columns = (x.to(rows) for x in _interpolation(self.model.encoder.sizes, size, straight=not exporting))
        wide, first = [], 0
        for shape, x in small.items():
            wide.append(x.unflatten(2, shape) @ columns[first : first + shape[1]])
            first += shape[1]
        knots = rows @ torch.cat(wide, dim=2)  # [maps, B, knots, W]
        if exporting or len(rows) == size[0]:
            return dict(zip(found, knots, strict=True))
        step = size[0] // (len(rows) - 1)
        part = (torch.arange(step, device=knots.device, dtype=knots.dtype)[:, None] + 0.5) / step
        between = torch.lerp(knots[:, :, :-1, None], knots[:, :, 1:, None], part)  # [maps, B, H / step, step, W]
        return dict(zip(found, between.flatten(2, 3), strict=True))


def _interpolation(
    sizes: Sequence[tuple[int, int]], size: tuple[int, int], *, straight: bool = True
) -> tuple[Tensor, Tensor]:
    """Matrices that bring maps of different sizes to an image's size, the sizes one after the other.

    Args:
        sizes: (H_s, W_s); each counts once.
        size: (H, W).
        straight: rows may stand for strips between which the interpolation is straight.

    Returns:
        rows [K, Σ H_s] and columns [Σ W_s, W]. K is H, or the number of edges of the strips of rows between which the
        interpolation is straight.
    """
    different = list(dict.fromkeys(sizes))
    step = _straight_step(size[0], [height for height, _ in different]) if straight else 1
    rows = torch.cat([_bilinear(size[0], height, step) for height, _ in different], dim=1)
    return rows, torch.cat([_bilinear(size[1], width).T for _, width in different])


def _in_units(normalized: Sequence[Tensor], units: Sequence[Tensor]) -> list[Tensor]:
    """D(s) from what `FilledScorer._reads` gives."""
    return [d * unit for d, unit in zip(normalized, units, strict=True)]


def _straight_step(large: int, small: Sequence[int]) -> int:
    """Linear interpolation from each of the small sizes is straight between multiples of so many rows; 1 where it is
    not."""
    if any(large % size or large // size % 2 for size in small):
        return 1
    return math.gcd(*(large // size // 2 for size in small))


def _bilinear(large: int, small: int, step: int = 1) -> Tensor:
    """The matrix of linear interpolation along one axis (align_corners=False).

    Args:
        large: rows to interpolate.
        small: rows there are.
        step: 1 gives the `large` rows [large, small]; else the edges of every so many rows, [large / step + 1, small].
    """
    rows = torch.arange(large) + 0.5 if step == 1 else torch.arange(0, large + 1, step)
    at = (rows * (small / large) - 0.5).clamp(0, small - 1)
    return (1 - (at[:, None] - torch.arange(small)).abs()).clamp_min(0)


def _divisor(query: Tensor, normalize: Normalize) -> Tensor:
    """What a normalisation divides queries [B, P, d] by, without its epsilon: [B, P, 1]."""
    if normalize == "none":
        return torch.ones_like(query[:, :, :1])
    # torch's own standard deviation is several times slower.
    centred = query - query.mean(dim=2, keepdim=True) if normalize == "layer" else query
    length: Tensor = torch.linalg.vector_norm(centred, dim=2, keepdim=True)
    return length / query.shape[2] ** 0.5 if normalize == "layer" else length


def _read(query: Tensor, memory: HopfieldMemory, top_k: int | None) -> tuple[Tensor, Tensor]:
    """1 − cos(z, HF(z)) and D = norm(z) − HF(z) of queries [B, P, d]: [B, P] and [B, P, d], float32."""
    if memory.values is None and memory.steps == 1 and memory.shrink == 0:
        found = AF.read_memory(
            query.float(),
            memory.prototypes,
            beta=memory.beta,
            normalize=memory.normalize,
            top_k=None if top_k is None else min(top_k, len(memory.prototypes)),
            deviation=True,
            impl=memory.impl,
            part=True,
        )
        return found.cosine, found.out
    z, deviation = normalize_rows(query.float(), memory.normalize), memory.deviation(query).float()
    return 1 - nn.functional.cosine_similarity(z, z - deviation, dim=2), deviation


class _Moments:
    """The running sums of some images for the Gaussians of all scales: those of positions, then those of images."""

    def __init__(self, local: Iterable[nn.Module], whole: Iterable[nn.Module]) -> None:
        self.sums: list[MomentSums] = []
        for gaussians in (*local, *whole):
            assert isinstance(gaussians, Gaussians)
            positions, features = gaussians.mean.shape
            self.sums.append(MomentSums(positions, features, gaussians.mean.device))

    def update(self, deviations: Sequence[Tensor]) -> None:
        """Add images: S tensors [b, P_s, d_s]."""
        scales = len(deviations)
        if not len(deviations[0]):
            return
        for local, whole, d in zip(self.sums[:scales], self.sums[scales:], deviations, strict=True):
            local.update(d if len(local.fourth) > 1 else d.flatten(0, 1)[:, None])
            whole.update(d.mean(dim=1, keepdim=True))

    def joined(self, other: _Moments) -> _Moments:
        """The sums of both sets of images."""
        result = _Moments([], [])
        for one, two in zip(self.sums, other.sums, strict=True):
            result.sums.append(join_moments(one, two))
        return result

    def gaussians(self) -> list[Gaussians]:
        """Fitted to these images."""
        found = []
        for sums in self.sums:
            gaussians = Gaussians(*sums.first.shape).to(sums.first.device)
            gaussians.fit(sums)
            found.append(gaussians)
        return found


def join_moments(one: MomentSums, two: MomentSums) -> MomentSums:
    """The sums of both sets of rows, relative to the first one's origin."""
    if one.origin is None or two.origin is None:
        return two if one.origin is None else one
    shift = (two.origin - one.origin)[:, 0]  # [P, d]; a row x of the second becomes x + shift
    n, length = two.count, shift.square().sum(dim=1)
    trace = two.second.diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # [P], Σ |x|²
    inner = (two.first * shift).sum(dim=1)  # Σ x·shift
    product = (two.second @ shift[:, :, None])[:, :, 0]  # [P, d], Σ (x·shift) x
    joint = copy.copy(one)
    joint.count = one.count + n
    joint.first = one.first + two.first + n * shift
    cross = two.first[:, :, None] * shift[:, None, :]
    joint.second = one.second + two.second + cross + cross.mT + n * shift[:, :, None] * shift[:, None, :]
    # |x + s|² (x + s) and |x + s|⁴ expanded.
    joint.third = (
        one.third
        + two.third
        + 2 * product
        + length[:, None] * two.first
        + (trace + 2 * inner + n * length)[:, None] * shift
    )
    quadratic = (shift * product).sum(dim=1)  # Σ (x·shift)²
    joint.fourth = (
        one.fourth
        + two.fourth
        + 4 * quadratic
        + n * length.square()
        + 4 * (two.third * shift).sum(dim=1)
        + 2 * length * trace
        + 4 * length * inner
    )
    return joint


def _spread(distances: Tensor) -> Tensor:
    """Standard deviation over images [S, N] -> [S]; the mean where nothing spreads, 1 where that is 0 too."""
    require(distances.shape[1] >= 2, "images", "at least two normals to fit a Gaussian", distances.shape[1])
    spread, typical = distances.std(dim=1), distances.mean(dim=1).abs()
    instead = torch.where(typical > 0, typical, torch.ones_like(typical))
    return torch.where(spread > 1e-5 * typical, spread, instead)  # less is rounding in float32
