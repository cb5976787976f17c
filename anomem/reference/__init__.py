"""The specification in plain PyTorch: every formula of AnoMem, readable, differentiable, in any floating dtype.

Each function computes in the dtype of its input, so float64 in gives float64 out; tests and benchmarks compare the
kernels with these functions and with nothing else. This package imports torch only and validates nothing:
`anomem.functional` is the public face.

Symbols follow the papers. `N` queries, `M` prototypes, `d` features, `G` groups (one sampled position of one scale
each), `B` images, `S` scales.
"""

from anomem.reference.contrast import contrast_rows, info_nce_rows, nt_xent_rows
from anomem.reference.deviation import deviation, deviation_map, distance
from anomem.reference.losses import contrasted_memory_loss, margin_loss, scale_weights
from anomem.reference.normalize import l2_normalize, layer_normalize, normalize_rows
from anomem.reference.positions import gather_positions, sample_positions
from anomem.reference.retrieval import Retrieval, hopfield_retrieve, shrink_weights, weights_entropy
from anomem.reference.usage import MemoryDiagnostics, memory_diagnostics
from anomem.reference.variance import variance_hinge

__all__ = [
    "MemoryDiagnostics",
    "Retrieval",
    "contrast_rows",
    "contrasted_memory_loss",
    "deviation",
    "deviation_map",
    "distance",
    "gather_positions",
    "hopfield_retrieve",
    "info_nce_rows",
    "l2_normalize",
    "layer_normalize",
    "margin_loss",
    "memory_diagnostics",
    "normalize_rows",
    "nt_xent_rows",
    "sample_positions",
    "scale_weights",
    "shrink_weights",
    "variance_hinge",
    "weights_entropy",
]
