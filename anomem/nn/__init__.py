"""Drop-in layers over `anomem.functional`."""

from anomem.nn.losses import ContrastedMemoryLoss, InfoNCELoss, NTXentLoss, VarianceHinge
from anomem.nn.memory import HopfieldMemory

__all__ = ["ContrastedMemoryLoss", "HopfieldMemory", "InfoNCELoss", "NTXentLoss", "VarianceHinge"]
