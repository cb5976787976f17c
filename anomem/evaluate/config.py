"""How images are scored, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anomem.reference.deviation_map import Distance

Pool = Literal["mean", "max", "topk"]


@dataclass(frozen=True)
class ScoreConfig:
    """Plain deviation and one-class detector."""

    distance: Distance = "cosine"
    """dev(z, HF(z)) of the plain deviation: 1 - cos, or Euclidean length."""
    pool: Pool = "mean"
    """How the distances at all positions become one number."""
    top_fraction: float = 0.1
    """Part of the positions that "topk" averages, the largest first; at least one."""
    alignment: Literal["auto", "per_position", "pooled"] = "auto"
    """Detector: one Gaussian per position, or one for all; "auto" asks the data set whether its images are aligned."""
    copies: int = 2
    """Lightly augmented copies of each training image to which the detector is fitted besides the image itself."""
    batch_size: int = 256
    """Images per forward pass."""
    seed: int = 0
    """Of the augmented copies."""
