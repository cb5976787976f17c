"""The paper's experiments: sweeps that resume, tables with the paper's figures beside ours, trends in words."""

from anomem.reproduce.experiments import EXPERIMENTS, Experiment
from anomem.reproduce.protocol import CLASSES, RATIOS, Scale
from anomem.reproduce.sweep import Sweep, read_rows, run

__all__ = ["CLASSES", "EXPERIMENTS", "RATIOS", "Experiment", "Scale", "Sweep", "read_rows", "run"]
