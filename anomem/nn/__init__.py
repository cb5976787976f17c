"""Drop-in layers over `anomem.functional`."""

from anomem.nn.batch_norm import BatchNorm2d
from anomem.nn.conv3x3 import Conv3x3, replace_convolutions
from anomem.nn.losses import ContrastedMemoryLoss, InfoNCELoss, NTXentLoss, VarianceHinge
from anomem.nn.memory import HopfieldMemory, from_hopfield_layer

__all__ = [
    "BatchNorm2d",
    "ContrastedMemoryLoss",
    "Conv3x3",
    "HopfieldMemory",
    "InfoNCELoss",
    "NTXentLoss",
    "VarianceHinge",
    "from_hopfield_layer",
    "replace_convolutions",
]
