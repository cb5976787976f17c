"""ScoreConfig: how images are scored, as plain values, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from anomem.reference.deviation_map import Distance
from anomem.scoring.detector import Alignment
from anomem.validation import require, require_choice, require_count

Pool = Literal["mean", "max", "topk"]
ConfiguredAlignment = Literal["auto", Alignment]


@dataclass(frozen=True)
class ScoreConfig:
    """Plain deviation and one-class detector."""

    distance: Distance = "cosine"
    """dev(z, HF(z)) of the plain deviation: 1 - cos, or Euclidean length."""
    pool: Pool = "mean"
    """How the distances at all positions become one number."""
    top_fraction: float = 0.1
    """Part of the positions that "topk" averages, the largest first; at least one position."""
    alignment: ConfiguredAlignment = "auto"
    """Detector: one Gaussian per position, or one for all; "auto" asks the data set whether its images are aligned."""
    copies: int = 2
    """Lightly augmented copies of each training image to which the detector is fitted besides the image itself."""
    batch_size: int = 256
    """Images per forward pass."""
    seed: int = 0
    """Seed of the augmented copies."""

    def __post_init__(self) -> None:
        require_choice(self.distance, "score.distance", get_args(Distance))
        require_choice(self.pool, "score.pool", get_args(Pool))
        require(0 < self.top_fraction <= 1, "score.top_fraction", "a part in (0, 1]", self.top_fraction)
        require_choice(self.alignment, "score.alignment", get_args(ConfiguredAlignment))
        require_count(self.copies, "score.copies", 0)
        require_count(self.batch_size, "score.batch_size", 1)
