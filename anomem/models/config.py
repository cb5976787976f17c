"""What an AnoMem model is made of, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anomem.backends import Impl
from anomem.reference.contrast import Weighting
from anomem.reference.retrieve import Normalize

Backbone = Literal["small", "resnet18", "resnet50", "efficientnet_b0"]
Stem = Literal["auto", "small", "standard"]


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and memories."""

    backbone: Backbone = "small"
    """Encoder; the torchvision ones start from random weights."""
    scales: tuple[str, ...] = ()
    """Stages whose maps are scales, e.g. layer2 layer3 layer4; empty for the backbone's own choice."""
    stem: Stem = "auto"
    """First layers: "small" keeps the resolution (3x3, stride 1, no pooling); "auto" takes it up to 64 pixels."""
    prototypes: tuple[int, ...] = (64,)
    """M, prototypes of each memory: one number for all scales, or one per scale."""
    projection: int | None = None
    """Width d of a 1x1 projection before each memory; None reads the features as they are."""
    normalize: Normalize = "layer"
    """What is done to queries and prototypes before their inner products."""
    beta: float | None = None
    """Inverse temperature of the retrieval; 1/sqrt(d) when None."""
    learn_beta: bool = False
    """Train beta along with the prototypes."""
    steps: int = 1
    """Reads per retrieval; all but the last update the query."""
    separate_values: bool = False
    """Give each memory its own values instead of reading the normalised prototypes."""
    scale_weights: Weighting = "exp"
    """lambda_s: "exp" is 2^(s-S), "linear" is s/S."""
    impl: Impl = "auto"
    """Implementation behind every operator: auto, reference, triton or native."""
