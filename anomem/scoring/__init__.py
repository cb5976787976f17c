"""From a trained model to scores and maps: the scorer, its one-class detector and its location prior."""

from anomem.scoring.config import FillConfig, ScoreConfig
from anomem.scoring.decision import Calibration, benjamini_hochberg
from anomem.scoring.detector import DeviationDetector, Gaussians, MomentSums
from anomem.scoring.fitted import FittedDetector, Verdicts, fit_detector
from anomem.scoring.prior import LocationPrior
from anomem.scoring.scorer import Scored, Scorer, fit_scorer, score_images, useless_scores

__all__ = [
    "Calibration",
    "DeviationDetector",
    "FillConfig",
    "FittedDetector",
    "Gaussians",
    "LocationPrior",
    "MomentSums",
    "ScoreConfig",
    "Scored",
    "Scorer",
    "Verdicts",
    "benjamini_hochberg",
    "fit_detector",
    "fit_scorer",
    "score_images",
    "useless_scores",
]
