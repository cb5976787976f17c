"""Multi-scale encoders, AnoMem (an encoder with a memory at every scale) and the heads of stage 2."""

from anomem.models.config import ModelConfig
from anomem.models.encoders import Encoder, MultiScaleEncoder, NetworkEncoder, build_encoder
from anomem.models.head import DeviationHead
from anomem.models.model import AnoMem, build_model, describe, parameter_count
from anomem.models.pretrained import PretrainedEncoder, pretrained_encoder
from anomem.models.tiled import TiledEncoder

__all__ = [
    "AnoMem",
    "DeviationHead",
    "Encoder",
    "ModelConfig",
    "MultiScaleEncoder",
    "NetworkEncoder",
    "PretrainedEncoder",
    "TiledEncoder",
    "build_encoder",
    "build_model",
    "describe",
    "parameter_count",
    "pretrained_encoder",
]
