"""Prototypes chosen among the features of normals: random rows, a greedy k-center coreset, or k-means centres.

The inner loops are `anomem.functional.nearest` and `k_center`. Nothing of size [N, M] is ever held: `nearest` is called
for blocks of rows, since its reference does hold the scores of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.validation import require, require_choice, require_count, require_tensor

Fill = Literal["random", "coreset", "kmeans"]
BLOCK_ELEMENTS = 2**23
"""Of a block of scores [L, b, M]: 32 MiB where the reference holds them."""


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
    seed: int | Sequence[int] = 0,
    iterations: int = 20,
) -> Tensor:
    """Choose M prototypes for the features of normals.

    Args:
        rows: [N, d] float32, normalised as the memory normalises its queries.
        count: M ≤ N.
        method: "random": M distinct rows. "coreset": greedy k-center (Gonzalez 1985), each next prototype the row that
            is farthest from those chosen. "kmeans": Lloyd's centres, started from random rows.
        seed: of the random rows, or of the coreset's first; several seeds choose a bank each. K-means reads the rows
            once for all banks.
        iterations: of k-means, at most; it stops when no row changes its centre.

    Returns:
        [M, d], for several seeds [L, M, d]. The same rows, method and seed give the same prototypes on one device, for
        any number of threads.

    Raises:
        ArgumentError: fewer rows than prototypes, non-finite features, no seed, or an unknown method.

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
    seeds = [seed] if isinstance(seed, int) else list(seed)
    require(len(seeds) > 0, "seed", "a number, or one per bank", "none")
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    if method == "coreset":
        banks = [
            rows[AF.k_center(rows, count, first=int(torch.randint(len(rows), (), generator=g)))] for g in generators
        ]
    else:
        banks = [rows[torch.randperm(len(rows), generator=g)[:count].to(rows.device)] for g in generators]
    chosen = torch.stack(banks)
    if method == "kmeans":
        chosen = kmeans(rows, chosen, iterations)
    return chosen[0] if isinstance(seed, int) else chosen


def kmeans(rows: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm (1982); a centre that lost all its rows takes the row that is farthest from its own.

    Args:
        rows: [N, d].
        start: [M, d], M ≤ N; or L banks [L, M, d], each of which goes its own way.
        iterations: at most.

    Returns:
        Centres [M, d] or [L, M, d].
    """
    banks = start.clone().reshape(-1, *start.shape[-2:])  # [L, M, d]
    previous: list[Tensor | None] = [None] * len(banks)
    moving = list(range(len(banks)))
    for _ in range(iterations):
        closest = nearest_in_blocks(rows, banks[moving])
        for bank, label, distance in zip(list(moving), closest.indices, closest.distance, strict=True):
            last = previous[bank]
            if last is not None and torch.equal(label, last):
                moving.remove(bank)
                continue
            previous[bank] = label
            size = torch.bincount(label, minlength=banks.shape[1])
            banks[bank] = _sums(rows, label, banks.shape[1]) / size.clamp_min(1)[:, None]
            empty = (size == 0).nonzero().flatten()
            if len(empty):
                banks[bank, empty] = rows[distance.topk(len(empty)).indices]
        if not moving:
            break
    return banks.reshape(start.shape)


def nearest_in_blocks(rows: Tensor, prototypes: Tensor) -> AF.Nearest:
    """The nearest prototype of every row, in blocks of rows.

    Args:
        rows: [N, d].
        prototypes: [M, d], or L banks [L, M, d].

    Returns:
        As `nearest` does: squared distances [N] or [L, N], and indices of the same shape.
    """
    block = max(1, BLOCK_ELEMENTS // (prototypes.numel() // prototypes.shape[-1]))
    parts = [AF.nearest(part, prototypes) for part in rows.split(block)]
    return AF.Nearest(*(torch.cat(of_parts, dim=-1) for of_parts in zip(*parts, strict=True)))


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
