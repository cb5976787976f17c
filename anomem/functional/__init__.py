"""The documented functions: each validates its arguments, picks an implementation and calls it.

Conventions. `N` queries, `M` prototypes, `d` features, `G` groups, `B` images. Kernels accumulate in float32 (float64
for float64); outputs shaped like features have the input's dtype, losses and log-sums are float32 (float64). Under
`torch.autocast` inputs are first cast to its dtype, as for a matrix product; `gather_positions`, `variance_hinge` and
`augment` compute in the dtype that they get.

`impl` is "auto" (a table of measured choices, printed by `python -m anomem.env`), "reference", "triton" or "native";
naming one that cannot run here raises `anomem.errors.ArgumentError` with the reason. `part=True` makes the name a
preference, for one call of a larger computation: an operator without such a kernel chooses by "auto".
"""

from anomem.functional.augment import augment
from anomem.functional.batch_norm import batch_norm
from anomem.functional.contrast import info_nce, nt_xent
from anomem.functional.contrast_blocks import BlockwiseNTXent, contrasted_memory_backward
from anomem.functional.conv3x3 import conv3x3
from anomem.functional.deviation_map import deviation, deviation_map
from anomem.functional.distributed import gather_rows, rows_per_process
from anomem.functional.downsample import downsample
from anomem.functional.joint import info_nce_distributed, nt_xent_distributed, variance_hinge_distributed
from anomem.functional.memory_loss import (
    ScaleVectors,
    contrasted_memory_loss,
    contrasted_memory_losses,
    margin_loss,
    scale_weights,
)
from anomem.functional.nearest import k_center, nearest
from anomem.functional.read import read_memory
from anomem.functional.retrieve import hopfield_retrieve
from anomem.functional.sampling import gather_positions, sample_positions, variance_hinge
from anomem.functional.usage import memory_diagnostics
from anomem.reference import MemoryDiagnostics, MemoryRead, Nearest, ViewParameters

__all__ = [
    "BlockwiseNTXent",
    "MemoryDiagnostics",
    "MemoryRead",
    "Nearest",
    "ScaleVectors",
    "ViewParameters",
    "augment",
    "batch_norm",
    "contrasted_memory_backward",
    "contrasted_memory_loss",
    "contrasted_memory_losses",
    "conv3x3",
    "deviation",
    "deviation_map",
    "downsample",
    "gather_positions",
    "gather_rows",
    "hopfield_retrieve",
    "info_nce",
    "info_nce_distributed",
    "k_center",
    "margin_loss",
    "memory_diagnostics",
    "nearest",
    "nt_xent",
    "nt_xent_distributed",
    "read_memory",
    "rows_per_process",
    "sample_positions",
    "scale_weights",
    "variance_hinge",
    "variance_hinge_distributed",
]
