"""Random augmentation of a batch on its device, and synthetic outliers."""

from anomem.augment.augmentation import Augmentation
from anomem.augment.config import AugmentConfig
from anomem.augment.outliers import OUTLIERS, synthesize_outliers

__all__ = ["OUTLIERS", "AugmentConfig", "Augmentation", "synthesize_outliers"]
