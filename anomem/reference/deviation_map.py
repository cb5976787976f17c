"""How far features are from what the memory gives back: the deviation D(s) = Z(s) − HF(Z(s))."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from anomem.reference.retrieve import Normalize, hopfield_retrieve, normalize_rows

Distance = Literal["cosine", "l2"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)


def deviation(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    shrink: float = 0.0,
) -> Tensor:
    """norm(q) − HF(q): both in the space in which the memory is read.

    Args:
        query: [..., d].
        prototypes: [M, d]; the other arguments as in `hopfield_retrieve`, with values of width d.

    Returns:
        [..., d].
    """
    retrieval = hopfield_retrieve(
        query, prototypes, values=values, beta=beta, steps=steps, normalize=normalize, shrink=shrink
    )
    return normalize_rows(query, normalize) - retrieval.out


def distance(query: Tensor, retrieved: Tensor, kind: Distance) -> Tensor:
    """dev(z, HF(z)): 1 − cos, or the Euclidean length of the difference.

    Args:
        query: [..., d], normalised as the memory normalises.
        retrieved: [..., d].
        kind: "cosine" (0 to 2, no unit) or "l2" (the unit of the features).

    Returns:
        [...].
    """
    if kind == "l2":
        length: Tensor = torch.linalg.vector_norm(query - retrieved, dim=-1)
        return length
    return 1 - torch.cosine_similarity(query, retrieved, dim=-1, eps=1e-12)


def deviation_map(
    feature_map: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    kind: Distance = "cosine",
    log_prior: Tensor | None = None,
) -> Tensor:
    """The distance between feature and retrieval at every position of a map.

    Args:
        feature_map: [B, d, H, W].
        prototypes: [M, d].
        log_prior: [H·W, M], `log pi(prototype | position)` added to the logits (location prior).

    Returns:
        [B, H, W].
    """
    batch, _, height, width = feature_map.shape
    query = feature_map.flatten(2).mT  # [B, HW, d]
    retrieval = hopfield_retrieve(
        query, prototypes, values=values, beta=beta, steps=steps, normalize=normalize, log_prior=log_prior
    )
    return distance(normalize_rows(query, normalize), retrieval.out, kind).reshape(batch, height, width)
