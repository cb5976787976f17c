"""A run as plain values: everything `config.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from anomem.augment import AugmentConfig
from anomem.data import DataConfig
from anomem.evaluate.config import ScoreConfig
from anomem.models import ModelConfig
from anomem.reference.contrast import Negatives


@dataclass(frozen=True)
class LossConfig:
    """Stage 1, Eqs. (2) to (4)."""

    temperature: float = 0.2
    """tau of the contrast."""
    variance_weight: float = 0.05
    """lambda_V."""
    negatives: Negatives = "image"
    """Other images at the same position, other positions of the same image, or both."""
    symmetric: bool = True
    """Contrast both ways and take the mean."""
    ratio: float = 1.0
    """r_s: part of a map's positions sampled in a step."""
    max_positions: int = 8
    """Cap on the sampled positions of a scale."""
    positions_per_image: bool = False
    """Draw positions for each image instead of once for the batch."""


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD with Nesterov momentum; linear warm-up, then cosine annealing to zero."""

    steps: int = 150
    """Gradient steps."""
    batch_size: int = 1024
    """Images per step; a smaller training set is one batch."""
    learning_rate: float = 0.05
    """Peak."""
    momentum: float = 0.9
    """Nesterov."""
    weight_decay: float = 5e-4
    """On everything but the memories."""
    warmup: int = 10
    """Steps of linear warm-up."""
    clip: float | None = None
    """Largest gradient norm; None clips nothing."""


@dataclass(frozen=True)
class Stage2Config:
    """Margin stage on the deviation maps; runs where there are anomalies to learn from, real or synthetic."""

    enabled: bool = True
    """Whether to run it at all."""
    margin: float = 2.0
    """M > 1: normals end inside radius 1/M, anomalies outside M."""
    hidden: int = 32
    """Channels of the head's convolutions."""
    embedding: int = 32
    """Length of g(s)."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=0.005, clip=5.0))
    """Its own optimisation."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run executes."""

    directory: str | None = None
    """Run directory; runs/<dataset>-<normal>-<seed> when None."""
    seed: int = 0
    """Of weights, batches, positions and augmentations."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; "auto" takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads; torch's own choice when None."""
    channels_last: bool = False
    """Keep images and maps channels-last."""
    bf16: bool = False
    """Run forward passes under bfloat16 autocast; weights stay float32."""
    compile: bool = False
    """Compile the encoder."""
    log_every: int = 10
    """Steps between log rows."""
    checkpoint_every: int = 0
    """Steps between checkpoints within a stage; 0 writes one at the end of each stage."""
    tensorboard: bool = False
    """Also write TensorBoard logs."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    """Images and their split."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentations of both stages."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder and memories."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Stage 1."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimisation of stage 1."""
    stage2: Stage2Config = field(default_factory=Stage2Config)
    """Stage 2."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Scoring."""
    run: RunConfig = field(default_factory=RunConfig)
    """Execution."""
    prototypes_from: Literal["normal", "features"] = "features"
    """First prototypes: drawn from N(0, 1), or features of the first batch."""
    synthetic_outliers: float = 0.0
    """Synthetic anomalies per normal image of a batch, in both stages; the paper uses none."""
