"""From a model to scores, maps and decisions: scorers of trained and of filled memories, and what is fitted to them."""

from anomem.scoring.config import FillConfig, ScoreConfig
from anomem.scoring.decision import Calibration, benjamini_hochberg, hold_out
from anomem.scoring.detector import DeviationDetector, Gaussians, MomentSums
from anomem.scoring.filled import FilledScorer, FilledScores, NormalQueries, fill_memories
from anomem.scoring.fitted import FittedDetector, Verdicts, fit_detector
from anomem.scoring.labelled import FewLabels
from anomem.scoring.prior import LocationPrior
from anomem.scoring.scorer import Scored, Scorer, fit_scorer, score_images, useless_scores

__all__ = [
    "Calibration",
    "DeviationDetector",
    "FewLabels",
    "FillConfig",
    "FilledScorer",
    "FilledScores",
    "FittedDetector",
    "Gaussians",
    "LocationPrior",
    "MomentSums",
    "NormalQueries",
    "ScoreConfig",
    "Scored",
    "Scorer",
    "Verdicts",
    "benjamini_hochberg",
    "fill_memories",
    "fit_detector",
    "fit_scorer",
    "hold_out",
    "score_images",
    "useless_scores",
]
