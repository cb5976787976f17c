"""How a memory is used: the figures by which a collapsed memory is seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anomem.reference.retrieve import Normalize, hopfield_retrieve, l2_normalize, weights_entropy


class MemoryDiagnostics(NamedTuple):
    """Usage of a memory over a set of N queries."""

    usage: Tensor
    """[M] int64, how many queries have this prototype as their strongest."""
    mass: Tensor
    """[M], mean retrieval weight of each prototype; sums to 1."""
    entropy: Tensor
    """[], mean entropy of one query's weights, in nats."""
    perplexity: Tensor
    """[], exp(entropy): over how many prototypes one query spreads. Near M: soft averaging."""
    effective: Tensor
    """[], exp of the entropy of `mass`: how many prototypes carry the whole set. Near 1: collapse."""
    mean_length: Tensor
    """[], |mean over queries of HF(q)/|HF(q)||, 0 to 1. Near 1: every query retrieves the same thing."""


def memory_diagnostics(
    query: Tensor,
    prototypes: Tensor,
    *,
    beta: float | Tensor | None = None,
    normalize: Normalize = "layer",
) -> MemoryDiagnostics:
    """Usage counts, assignment entropy and effective number of prototypes.

    Args:
        query: [N, d], N ≥ 1.
        prototypes: [M, d].
        beta: as in `hopfield_retrieve`.
        normalize: as in `hopfield_retrieve`.
    """
    retrieval = hopfield_retrieve(query, prototypes, beta=beta, normalize=normalize)
    nearest = retrieval.weights.argmax(dim=-1)  # [N]
    # Not bincount, which waits for a GPU to learn how many bins there are.
    usage = nearest.new_zeros(prototypes.shape[0]).scatter_add_(0, nearest, torch.ones_like(nearest))
    mass = retrieval.weights.mean(dim=0)
    entropy = weights_entropy(retrieval.weights).mean()
    mean_length = torch.linalg.vector_norm(l2_normalize(retrieval.out).mean(dim=0))
    return MemoryDiagnostics(usage, mass, entropy, entropy.exp(), weights_entropy(mass).exp(), mean_length)
