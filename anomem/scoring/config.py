"""ScoreConfig and FillConfig: how images are scored, as plain values, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from anomem.reference.deviation_map import Distance
from anomem.scoring.detector import Alignment
from anomem.scoring.learn import Method
from anomem.validation import require, require_choice, require_count, require_setting

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
    detector_megabytes: int = 3072
    """Limit of what the detector's Gaussians, one per position, take while they are fitted. A third of it is kept.
    Where they would take more, they are fitted to fewer channels, by a fixed projection."""
    batch_size: int = 256
    """Images per forward pass."""
    seed: int = 0
    """Seed of the augmented copies."""

    def __post_init__(self) -> None:
        require_choice(self.distance, "score.distance", get_args(Distance))
        require_choice(self.pool, "score.pool", get_args(Pool))
        require_setting(self.top_fraction, "score.top_fraction")
        require(0 < self.top_fraction <= 1, "score.top_fraction", "a part in (0, 1]", self.top_fraction)
        require_choice(self.alignment, "score.alignment", get_args(ConfiguredAlignment))
        require_count(self.copies, "score.copies", 0, 1000)
        require_count(self.detector_megabytes, "score.detector_megabytes", 1)
        require_count(self.batch_size, "score.batch_size", 1, 2**31)
        require_count(self.seed, "score.seed", 0, 2**31)


@dataclass(frozen=True)
class FillConfig:
    """Filled memories and their scores."""

    method: Method = "kmeans"
    """How prototypes are chosen among the features of normals: kmeans, coreset (greedy k-center) or random.
    learned: the centres of kmeans, moved by gradient steps; for small memories."""
    prototypes: tuple[int | float, ...] = (1024,)
    """M of each memory, or a ratio in (0, 1) of the features: one number for all scales, or one per scale."""
    beta_factor: float = 4.0
    """beta in units of 1/sqrt(d)."""
    top_k: int | None = 8
    """Prototypes that a feature reads, those with the largest scores, at most 32; all when None, which is slower."""
    top_fraction: float = 0.1
    """Part of the positions, the largest distances first, whose mean is an image's distance."""
    batch_size: int = 64
    """Images per forward pass."""

    def __post_init__(self) -> None:
        require_choice(self.method, "fill.method", get_args(Method))
        require(len(self.prototypes) > 0, "fill.prototypes", "one number, or one per scale", "none")
        for count in self.prototypes:
            ratio = isinstance(count, float) and 0 < count < 1
            whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            require(ratio or whole, "fill.prototypes", "integers ≥ 1 or ratios in (0, 1)", count)
        require_setting(self.beta_factor, "fill.beta_factor")
        require(self.beta_factor > 0, "fill.beta_factor", "a number > 0", self.beta_factor)
        if self.top_k is not None:
            require_count(self.top_k, "fill.top_k", 1, 32)
        require_setting(self.top_fraction, "fill.top_fraction")
        require(0 < self.top_fraction <= 1, "fill.top_fraction", "a part in (0, 1]", self.top_fraction)
        require_count(self.batch_size, "fill.batch_size", 1)
