"""From a trained model to scores and maps: the scorer, its one-class detector and its location prior."""

from anomem.scoring.config import ScoreConfig
from anomem.scoring.detector import DeviationDetector, Gaussians, MomentSums
from anomem.scoring.prior import LocationPrior
from anomem.scoring.scorer import Scored, Scorer, fit_scorer, score_images, useless_scores

__all__ = [
    "DeviationDetector",
    "Gaussians",
    "LocationPrior",
    "MomentSums",
    "ScoreConfig",
    "Scored",
    "Scorer",
    "fit_scorer",
    "score_images",
    "useless_scores",
]
