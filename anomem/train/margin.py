"""AdaptiveMargin: the margin M of stage 2 adapted while training, which the paper calls work in progress.

The margin loss cannot train M itself: its gradient with respect to M is 1/M² for every normal outside of radius 1/M
and 1 for every anomaly inside of M, never negative. Descent ends at M = 1, where both lie on the unit sphere. A fixed
large M is ill-posed: neither radius is reached. Between the two, M is as large as the batches can satisfy:

    log M ← log M + rate · (target − v),   v = Σ_s lambda_s (v_normal(s) + v_anomalous(s)) / (2 Σ_s lambda_s)

v_normal is the share of the normals outside of 1/M, v_anomalous that of the anomalies inside of M. M grows while fewer
than `target` violate their radius and shrinks while more do (the stochastic approximation of Robbins and Monro 1951).
The two classes weigh the same, whatever the batch holds. M stays within [LOWEST, HIGHEST].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

LOWEST, HIGHEST = 1.1, 8.0
"""At 1 nothing is separated; beyond 8 the radii of the two classes differ by more than 64 times."""
TARGET = 0.1
"""Share of violations at which M rests."""
RATE = 0.05
"""Of log M per step: M moves by at most 5% a step."""


class AdaptiveMargin(nn.Module):
    """M as a 0-dim buffer, so that a checkpoint keeps it; nothing waits for the device.

    Args:
        margin: M at the first step.

    Attributes:
        value: M, 0-dim.

    Example:
        >>> margin = AdaptiveMargin(2.0)
        >>> loss = AF.margin_loss(lengths[0], is_normal, margin.value)
        >>> margin.update(margin.violations(lengths, is_normal, scale_weights))
    """

    value: Tensor

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(float(margin)))

    @torch.no_grad()
    def violations(self, lengths: Sequence[Tensor], is_normal: Tensor, weights: Sequence[float]) -> Tensor:
        """How many images of a batch, or of a part of one, violate their radius; parts are added.

        Args:
            lengths: |g(s)| of each scale, S tensors [B].
            is_normal: [B] bool.
            weights: lambda_s.

        Returns:
            [2, 2]: of the normals and of the anomalies, the violating ones (averaged over scales) and their number.
        """
        kinds = torch.stack([is_normal, ~is_normal])  # [2, B]
        found = torch.zeros(2, device=is_normal.device)
        for weight, length in zip(weights, lengths, strict=True):
            violated = torch.where(is_normal, length > 1 / self.value, length < self.value)
            found += weight / sum(weights) * (violated & kinds).sum(dim=1)
        return torch.stack([found, kinds.sum(dim=1).float()], dim=1)

    @torch.no_grad()
    def update(self, violations: Tensor) -> None:
        """Move M.

        Args:
            violations: [2, 2] of the whole batch; a class that is missing counts as not violating.
        """
        found, counts = violations.unbind(dim=1)
        share = torch.where(counts > 0, found / counts, 0.0).mean()
        step = RATE * (TARGET - share)
        self.value.copy_((self.value.log() + step).clamp(math.log(LOWEST), math.log(HIGHEST)).exp())
