"""Drop-in layers over `anomem.functional`."""

from anomem.nn.batch_norm import BatchNorm2d
from anomem.nn.losses import ContrastedMemoryLoss, InfoNCELoss, NTXentLoss, VarianceHinge
from anomem.nn.memory import HopfieldMemory, from_hopfield_layer

__all__ = [
    "BatchNorm2d",
    "ContrastedMemoryLoss",
    "HopfieldMemory",
    "InfoNCELoss",
    "NTXentLoss",
    "VarianceHinge",
    "from_hopfield_layer",
]
