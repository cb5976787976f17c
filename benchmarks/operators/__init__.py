"""What is computed, one file for each family of operators."""

from __future__ import annotations

from benchmarks.operators.base import Operator, Work
from benchmarks.operators.contrast import INFO_NCE, NT_XENT
from benchmarks.operators.deviation import DEVIATION_MAP
from benchmarks.operators.memory_loss import MEMORY_LOSS
from benchmarks.operators.retrieval import RETRIEVE, SHRINK, USAGE
from benchmarks.operators.sampling import GATHER, SAMPLE, VARIANCE

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (RETRIEVE, SHRINK, NT_XENT, INFO_NCE, GATHER, VARIANCE, SAMPLE, DEVIATION_MAP, USAGE, MEMORY_LOSS)
}

__all__ = ["OPERATORS", "Operator", "Work"]
