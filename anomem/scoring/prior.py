"""LocationPrior: which prototypes each position of a normal image retrieves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from anomem.models import AnoMem
from anomem.reference.retrieve import hopfield_retrieve


class LocationPrior(nn.Module):
    """log pi(prototype | position), added to the logits of the retrieval before the plain deviation.

    Args:
        positions: P_s of each scale.
        prototypes: M_s of each scale.

    Attributes:
        log_priors: S buffers [P_s, M_s]; uniform (zero) until fitted.
    """

    def __init__(self, positions: Sequence[int], prototypes: Sequence[int]) -> None:
        super().__init__()
        self.scales = len(positions)
        for s, (p, m) in enumerate(zip(positions, prototypes, strict=True)):
            self.register_buffer(f"log_prior{s}", torch.zeros(p, m))

    @property
    def log_priors(self) -> list[Tensor]:
        """S tensors [P_s, M_s]."""
        return [self.get_buffer(f"log_prior{s}") for s in range(self.scales)]

    @torch.no_grad()
    def fit(self, model: AnoMem, batches: Iterable[Sequence[Tensor]]) -> None:
        """Take the mean retrieval weights of normals at every position, with one pseudo-image of uniform weights.

        Args:
            model: its memories are read.
            batches: S tensors of queries [B, P_s, d_s] each.
        """
        sums = [torch.full_like(prior, 1 / prior.shape[1]) for prior in self.log_priors]
        for queries in batches:
            for total, query, memory in zip(sums, queries, model.memories, strict=True):
                retrieved = hopfield_retrieve(
                    query.float(),
                    memory.prototypes,
                    values=memory.values,
                    beta=memory.beta,
                    steps=memory.steps,
                    normalize=memory.normalize,
                )
                total += retrieved.weights.sum(dim=0)
        for prior, total in zip(self.log_priors, sums, strict=True):
            prior.copy_((total / total.sum(dim=1, keepdim=True)).log())
