"""The read of a filled memory: Eq. (1) of AnoMem with tied prototypes, and what describes how well it fits a feature.

    s_m = beta · q·k_m + bias_m,    w = softmax(s) over all prototypes or over the k largest,    r = Σ_m w_m k_m

With beta = 2/tau and bias_m = −|k_m|²/tau this is the softmax of −|q − k_m|²/tau (ProCon, 2026). With k = 1 it is the
nearest neighbour of PatchCore (Roth et al. 2022). q and k are normalised first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anomem.reference.deviation_map import distance
from anomem.reference.nearest import nearest
from anomem.reference.retrieve import Normalize, normalize_rows, weights_entropy


class MemoryRead(NamedTuple):
    """What one read gives for each query."""

    out: Tensor
    """[..., d], the read r, or the deviation norm(q) − r."""
    residual: Tensor
    """[...], |norm(q) − r|."""
    cosine: Tensor
    """[...], 1 − cos(norm(q), r), from 0 to 2."""
    distance: Tensor | None
    """[...], squared distance to the nearest of all prototypes; None where it was not asked for."""
    indices: Tensor | None
    """[...] int64, of the nearest prototype."""
    entropy: Tensor
    """[...], of the weights, in nats."""
    lse: Tensor
    """[...], logsumexp of the scores of the prototypes that are read."""


def read_memory(
    query: Tensor,
    prototypes: Tensor,
    *,
    beta: float | Tensor | None = None,
    normalize: Normalize = "layer",
    bias: Tensor | None = None,
    top_k: int | None = None,
    want_nearest: bool = False,
    deviation: bool = False,
) -> MemoryRead:
    """Read a memory whose values are its normalised prototypes.

    Args:
        query: [..., N, d].
        prototypes: [M, d], or L banks [L, M, d] for query [L, N, d] or [N, d].
        beta: inverse temperature, a number or a 0-dim tensor; 1/sqrt(d) when None.
        normalize: what is done to query and prototypes first.
        bias: [M] or [L, M], added to the scores.
        top_k: how many prototypes are read, those with the largest scores; all when None.
        want_nearest: whether distance and index are given.
        deviation: whether `out` is norm(q) − r.

    Returns:
        `MemoryRead`, of shape [..., N] each, `out` [..., N, d].
    """
    q, keys = normalize_rows(query, normalize), normalize_rows(prototypes, normalize)
    scores = (query.shape[-1] ** -0.5 if beta is None else beta) * (q @ keys.mT)  # [..., N, M]
    if bias is not None:
        scores = scores + bias[..., None, :]
    if top_k is not None:
        scores = torch.where(among_largest(scores.detach(), top_k), scores, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    out = weights @ keys
    found = nearest(q, keys) if want_nearest else None
    return MemoryRead(
        q - out if deviation else out,
        distance(q, out, "l2"),
        distance(q, out, "cosine"),
        None if found is None else found.distance[..., 0],
        None if found is None else found.indices[..., 0],
        weights_entropy(weights),
        torch.logsumexp(scores, dim=-1),
    )


def among_largest(scores: Tensor, k: int) -> Tensor:
    """Which scores are the k largest of their row: of equal ones the first, and NaN last.

    Args:
        scores: [..., M].
        k: from 1 to M.

    Returns:
        [..., M] bool, k in each row.
    """
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    least = scores.topk(k, dim=-1).values[..., -1:]
    larger, equal = scores > least, scores == least
    left = k - larger.sum(dim=-1, keepdim=True)
    return larger | (equal & (equal.cumsum(dim=-1) <= left))
