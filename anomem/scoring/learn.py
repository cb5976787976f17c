"""Learned prototypes: k-means centres, moved until features of normals deviate less than outliers made of them.

An outlier z + 0.5 (z − z') lies beyond a normal feature z, seen from another one z'. The loss is a surrogate of
1 − AUROC (a pairwise logistic loss, as in Gao and Zhou 2015): the mean of softplus((dev(z) − dev(outlier)) / spread)
over all pairs of a normal feature and an outlier of a batch. The normals that deviate most weigh most, as they do in an
image's score.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from anomem import functional as AF
from anomem.reference.retrieve import Normalize, normalize_rows
from anomem.validation import require, require_count, require_number, require_positive_number, require_tensor

Method = Literal["random", "coreset", "kmeans", "learned"]
"""How memories are filled: by a choice of `fill_prototypes`, or by k-means and `learn_prototypes`."""
BATCH, OUTLIERS = 512, 128
"""Normal features and outliers of a step."""
RATE, WARMUP = 0.03, 10
"""Of Adam: peak, and steps until it is reached; then a cosine to zero."""
STEPS = 200
BEYOND = 0.5
"""How far an outlier lies beyond a feature, in units of the distance from another feature."""


def learn_prototypes(
    rows: Tensor,
    start: Tensor,
    *,
    beta: float,
    normalize: Normalize = "layer",
    steps: int = STEPS,
    beyond: float = BEYOND,
    seed: int = 0,
) -> Tensor:
    """Move prototypes by gradient steps so that features deviate less from what the memory returns than outliers do.

    Args:
        rows: [N, d] float32, features of normals, normalised as the memory normalises its queries.
        start: [M, d], first prototypes.
        beta: inverse temperature of the retrieval.
        normalize: of the memory.
        steps: gradient steps of 512 features each.
        beyond: how far outliers lie beyond a feature, in units of the distance from another feature.
        seed: of the batches.

    Returns:
        [M, d], on the device of `start`.

    Raises:
        ArgumentError: no rows, rows of another width, or a wrong number.

    Example:
        >>> rows = torch.nn.functional.layer_norm(torch.randn(5000, 40), (40,))
        >>> start = fill_prototypes(rows, 64)
        >>> prototypes = learn_prototypes(rows, start, beta=4 / 40**0.5)
    """
    require_tensor(rows, "rows", (2,), "[N, d]")
    require_tensor(start, "start", (2,), "[M, d]")
    right = len(rows) > 0 and rows.shape[1] == start.shape[1]
    require(right, "rows", lambda: f"[N, {start.shape[1]}] with N ≥ 1", rows)
    require_number(beta, "beta")
    require_count(steps, "steps", 0)
    require_positive_number(beyond, "beyond")
    generator = torch.Generator().manual_seed(seed)
    prototypes = nn.Parameter(start.detach().clone())
    optimizer = torch.optim.Adam([prototypes], lr=RATE, betas=(0.9, 0.99))
    spread: Tensor | None = None

    def deviation(z: Tensor) -> Tensor:
        read = AF.hopfield_retrieve(z, prototypes, beta=beta, normalize=normalize)
        return 1 - nn.functional.cosine_similarity(normalize_rows(z, normalize), read, dim=1)

    for step in range(steps):
        rise, fall = min(1, (step + 1) / WARMUP), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * rise * fall
        z = rows[torch.randint(len(rows), (BATCH,), generator=generator).to(rows.device)]
        some, others = z[:OUTLIERS], z[-OUTLIERS:]
        with torch.enable_grad():
            normal, outlying = deviation(z), deviation(some + beyond * (some - others))
            if spread is None:
                # Features that are all alike have no spread; any unit serves them.
                spread = normal.detach().std().clamp_min(1e-6)
            loss = nn.functional.softplus((normal[:, None] - outlying) / spread).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return prototypes.detach()
