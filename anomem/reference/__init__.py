"""The specification in plain PyTorch: every formula of AnoMem, readable, differentiable, in any floating dtype.

Each function computes in the dtype of its input, so float64 in gives float64 out; tests and benchmarks compare the
kernels with these functions and with nothing else. This package imports torch only and validates nothing:
`anomem.functional` is the public face.

Symbols follow the papers. `N` queries, `M` prototypes, `d` features, `G` groups (one sampled position of one scale
each), `B` images, `S` scales.
"""

from anomem.reference.augment import Padding, ViewParameters, augment, blur_radius, normal_numbers
from anomem.reference.batch_norm import batch_norm, joint_moments, merged_moments, normalised_by, update_running
from anomem.reference.contrast import (
    Negatives,
    Weighting,
    block_gradient,
    block_log_sums,
    contrast_rows,
    contrasted_memory_loss,
    info_nce_rows,
    margin_loss,
    nt_xent_rows,
    scale_weights,
    through_l2,
)
from anomem.reference.conv3x3 import conv3x3
from anomem.reference.deviation_map import Distance, deviation, deviation_map, distance
from anomem.reference.downsample import downsample
from anomem.reference.nearest import Nearest, k_center, nearest
from anomem.reference.read import MemoryRead, read_memory
from anomem.reference.retrieve import (
    Normalize,
    Retrieval,
    hopfield_retrieve,
    l2_normalize,
    layer_normalize,
    normalize_rows,
    retrieval_logits,
    retrieval_weights,
    shrink_weights,
    weights_entropy,
)
from anomem.reference.sampling import gather_positions, sample_positions, variance_hinge
from anomem.reference.usage import MemoryDiagnostics, memory_diagnostics

__all__ = [
    "Distance",
    "MemoryDiagnostics",
    "MemoryRead",
    "Nearest",
    "Negatives",
    "Normalize",
    "Padding",
    "Retrieval",
    "ViewParameters",
    "Weighting",
    "augment",
    "batch_norm",
    "block_gradient",
    "block_log_sums",
    "blur_radius",
    "contrast_rows",
    "contrasted_memory_loss",
    "conv3x3",
    "deviation",
    "deviation_map",
    "distance",
    "downsample",
    "gather_positions",
    "hopfield_retrieve",
    "info_nce_rows",
    "joint_moments",
    "k_center",
    "l2_normalize",
    "layer_normalize",
    "margin_loss",
    "memory_diagnostics",
    "merged_moments",
    "nearest",
    "normal_numbers",
    "normalised_by",
    "normalize_rows",
    "nt_xent_rows",
    "read_memory",
    "retrieval_logits",
    "retrieval_weights",
    "sample_positions",
    "scale_weights",
    "shrink_weights",
    "through_l2",
    "update_running",
    "variance_hinge",
    "weights_entropy",
]
