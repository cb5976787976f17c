"""Multi-scale encoders with memories, and the detectors on their deviation maps."""

from anomem.models.config import ModelConfig
from anomem.models.describe import describe, parameter_count
from anomem.models.detector import DeviationDetector
from anomem.models.encoders import Encoder, MultiScaleEncoder, NetworkEncoder, build_encoder
from anomem.models.gaussian import Gaussians, MomentSums
from anomem.models.head import DeviationHead
from anomem.models.model import AnoMem, build_model
from anomem.models.prior import LocationPrior

__all__ = [
    "AnoMem",
    "DeviationDetector",
    "DeviationHead",
    "Encoder",
    "Gaussians",
    "LocationPrior",
    "ModelConfig",
    "MomentSums",
    "MultiScaleEncoder",
    "NetworkEncoder",
    "build_encoder",
    "build_model",
    "describe",
    "parameter_count",
]
