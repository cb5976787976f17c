"""Prototypes chosen among the features of normals: random rows, a greedy k-center coreset, or k-means centres.

Plain PyTorch, in blocks of rows: nothing of size [N, M] is ever held. `nearest` and `lower_distances` are the two inner
loops; everything else is written with them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from anomem.validation import require, require_choice, require_count, require_tensor

Fill = Literal["random", "coreset", "kmeans"]
BLOCK_ELEMENTS = 2**19
"""Of a block of inner products [b, M]: 2 MiB, which stay in a core's cache."""


def prototype_count(wanted: float, rows: int) -> int:
    """M for a number of rows.

    Args:
        wanted: an integer is M itself, no more than there are rows; a ratio in (0, 1) is a part of the rows.
        rows: N.

    Raises:
        ArgumentError: neither a positive integer nor a ratio in (0, 1).
    """
    ratio = isinstance(wanted, float) and 0 < wanted < 1
    count = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1
    require(ratio or count, "prototypes", "an integer ≥ 1, or a ratio in (0, 1) of the features", wanted)
    return max(1, round(wanted * rows)) if ratio else min(int(wanted), rows)


def fill_prototypes(
    rows: Tensor,
    count: int,
    method: Fill = "kmeans",
    *,
    seed: int = 0,
    iterations: int = 20,
) -> Tensor:
    """Choose M prototypes for the features of normals.

    Args:
        rows: [N, d] float32, normalised as the memory normalises its queries.
        count: M ≤ N.
        method: "random": M distinct rows. "coreset": greedy k-center (Gonzalez 1985), each next prototype the row that
            is farthest from those chosen. "kmeans": Lloyd's centres, started from random rows.
        seed: of the random rows, or of the coreset's first.
        iterations: of k-means, at most; it stops when no row changes its centre.

    Returns:
        [M, d]. The same rows, method and seed give the same prototypes on one device.

    Raises:
        ArgumentError: fewer rows than prototypes, non-finite features, or an unknown method.

    Example:
        >>> prototypes = fill_prototypes(torch.randn(5000, 40), 64)
        >>> prototypes.shape
        torch.Size([64, 40])
    """
    require_tensor(rows, "rows", (2,), "[N, d]")
    require_choice(method, "fill", get_args(Fill))
    require_count(count, "prototypes", 1)
    require(count <= len(rows), "prototypes", lambda: f"at most {len(rows)}, the features of normals", count)
    require(bool(rows.isfinite().all()), "rows", "finite features", "NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    if method == "coreset":
        return rows[coreset(rows, count, int(torch.randint(len(rows), (), generator=generator)))]
    start = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    return start if method == "random" else kmeans(rows, start, iterations)


def kmeans(rows: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm (1982); a centre that lost all its rows takes the row that is farthest from its own.

    Args:
        rows: [N, d].
        start: [M, d], M ≤ N.
        iterations: at most.

    Returns:
        Centres [M, d].
    """
    centres = start.clone()
    previous: Tensor | None = None
    for _ in range(iterations):
        label, distance = nearest(rows, centres)
        if previous is not None and torch.equal(label, previous):
            break
        previous = label
        size = torch.bincount(label, minlength=len(centres))
        centres = _sums(rows, label, len(centres)) / size.clamp_min(1)[:, None]
        empty = (size == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = rows[distance.topk(len(empty)).indices]
    return centres


def coreset(rows: Tensor, count: int, first: int) -> Tensor:
    """Greedy k-center: every next row is the one farthest from all rows chosen before it.

    Args:
        rows: [N, d].
        count: M ≤ N.
        first: the row to begin with.

    Returns:
        [M] int64, indices of rows.
    """
    chosen = torch.empty(count, dtype=torch.int64, device=rows.device)
    length = rows.square().sum(dim=1)
    distance = torch.full_like(length, torch.inf)
    chosen[0] = first
    for i in range(count):
        if i:
            chosen[i] = distance.argmax()
        lower_distances(distance, rows, length, chosen[i])
    return chosen


def nearest(rows: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest prototype of every row.

    Args:
        rows: [N, d].
        prototypes: [M, d].

    Returns:
        Index [N] int64, and squared distance [N] ≥ 0.
    """
    half_length = prototypes.square().sum(dim=1) / -2
    index = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    best = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
    block = max(1, BLOCK_ELEMENTS // len(prototypes))
    transposed = prototypes.T
    for begin in range(0, len(rows), block):
        part = slice(begin, begin + block)
        # |x − c|² = |x|² − 2 (x·c − |c|²/2), smallest where the bracket is largest
        torch.max(torch.addmm(half_length, rows[part], transposed), dim=1, out=(best[part], index[part]))
    return index, (rows.square().sum(dim=1) - 2 * best).clamp_min_(0)


def lower_distances(distance: Tensor, rows: Tensor, length: Tensor, chosen: Tensor) -> None:
    """Lower each row's squared distance to that from one more chosen row, in place; the chosen row's becomes −1.

    Args:
        distance: [N], overwritten.
        rows: [N, d].
        length: [N], |row|².
        chosen: index of the row, 0-dim int64.
    """
    centre = rows[chosen]
    torch.minimum(distance, torch.addmv(length, rows, centre, alpha=-2).add_(length[chosen]), out=distance)
    distance[chosen] = -1.0


def _sums(rows: Tensor, label: Tensor, count: int) -> Tensor:
    """Sum of the rows of each label [M, d], always in the same order."""
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device=rows.device)
    if rows.device.type == "cpu":
        return sums.index_add_(0, label, rows)  # sequential over rows
    return sums.index_put_((label,), rows, accumulate=True)  # sorts, where index_add_ would use atomics


class FeatureRows:
    """Collects the features of normals of one scale, no more than a given number of rows.

    What does not fit replaces earlier rows so that all rows are equally likely to be kept (reservoir sampling).

    Args:
        at_most: rows to hold.
        seed: of the choice.
    """

    def __init__(self, at_most: int = 400_000, seed: int = 0) -> None:
        require_count(at_most, "at_most", 1)
        self.at_most = at_most
        self.generator = torch.Generator().manual_seed(seed)
        self.parts: list[Tensor] = []
        self.seen = 0

    def add(self, rows: Tensor) -> None:
        """Add rows [n, d]."""
        room = max(0, self.at_most - self.seen)
        kept, rest = rows[:room], rows[room:]
        if len(kept):
            self.parts.append(kept.detach().clone())
        self.seen += len(rows)
        if not len(rest):
            return
        held = self.rows()
        number = torch.arange(self.seen - len(rest), self.seen) + 1
        place = (torch.rand(len(rest), generator=self.generator, dtype=torch.float64) * number).long()
        inside = place < self.at_most
        for source, target in zip(inside.nonzero().flatten().tolist(), place[inside].tolist(), strict=True):
            held[target] = rest[source]

    def rows(self) -> Tensor:
        """The rows held, [n, d]."""
        require(len(self.parts) > 0, "images", "at least one normal image", "none")
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]
