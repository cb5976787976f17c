"""ModelConfig: the encoder and the memories of a model as plain values, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from anomem.reference.contrast import WEIGHTINGS, Weighting
from anomem.reference.retrieve import NORMALIZE, Normalize
from anomem.rules import IMPLEMENTATIONS, Impl
from anomem.validation import require, require_choice, require_count, require_names, require_setting, require_several

Backbone = Literal["small", "resnet18", "resnet50", "efficientnet_b0"]
Stem = Literal["auto", "small", "standard"]

_RESNET = ("stem", "layer1", "layer2", "layer3", "layer4")
STAGES: dict[Backbone, tuple[str, ...]] = {
    "small": ("stem", "block1", "block2", "block3"),
    "resnet18": _RESNET,
    "resnet50": _RESNET,
    "efficientnet_b0": ("stem", *(f"stage{i}" for i in range(1, 9))),
}
"""Stages of each backbone, fine to coarse."""
DEFAULT_SCALES: dict[Backbone, tuple[str, ...]] = {
    "small": ("block1", "block2", "block3"),
    "resnet18": ("layer2", "layer3", "layer4"),
    "resnet50": ("layer2", "layer3", "layer4"),
    "efficientnet_b0": ("stage3", "stage5", "stage7"),
}
"""Scales of each backbone where a configuration names none."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and memories.

    Raises:
        ArgumentError: an unknown name, or a number outside of its range.
    """

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
    """Normalisation of queries and prototypes before their inner products."""
    beta: float | None = None
    """Inverse temperature of the retrieval; 1/sqrt(d) when None."""
    learn_beta: bool = False
    """Train beta together with the prototypes."""
    steps: int = 1
    """Reads per retrieval; all but the last update the query."""
    separate_values: bool = False
    """Give each memory its own values instead of reading the normalised prototypes."""
    scale_weights: Weighting = "exp"
    """lambda_s: "exp" is 2^(s-S), "linear" is s/S."""
    impl: Impl = "auto"
    """Implementation of every operator: auto, reference, triton or native."""

    def __post_init__(self) -> None:
        require_choice(self.backbone, "model.backbone", get_args(Backbone))
        require_names(self.scales, "model.scales", STAGES[self.backbone])
        require_choice(self.stem, "model.stem", get_args(Stem))
        require_several(self.prototypes, "model.prototypes")
        require(len(self.prototypes) > 0, "model.prototypes", "one number, or one per scale", "none")
        for count in self.prototypes:
            require_count(count, "model.prototypes", 1, 2**20)
        if self.projection is not None:
            # The normalisation leaves a direction: of one number nothing, of two one of two values.
            fewest = {"layer": 3, "l2": 2}.get(self.normalize, 1)
            require_count(self.projection, "model.projection", fewest, 2**16)
        require_choice(self.normalize, "model.normalize", NORMALIZE)
        if self.beta is not None:
            require_setting(self.beta, "model.beta")
            right = 1e-6 <= self.beta <= 1e6
            require(right, "model.beta", "a number > 0, from 1e-6 to 1e6, or None for 1/sqrt(d)", self.beta)
        require_count(self.steps, "model.steps", 1, 1000)
        require_choice(self.scale_weights, "model.scale_weights", WEIGHTINGS)
        require_choice(self.impl, "model.impl", IMPLEMENTATIONS)
