"""What is computed: NT-Xent and its rectangular form, InfoNCE.

Flops, with n = 2B rows in each of G groups. The similarities u uᵀ are symmetric, so half of 2·n²·d is enough: n²·d
forward. The gradient is a full [n, n] matrix times u, 2·n²·d. The floor counts 3·G·n²·d for both passes. Plain PyTorch
does 2 + 4 of them, a kernel that recomputes each tile pair once does 1 + 3. The rectangular form has no symmetry:
2·R·C·d forward, 4·R·C·d backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.testing import draw
from benchmarks.harness.case import Dims, Function, Operator, Work, capped

TEMPERATURE = 0.2
INFO_NCE_TEMPERATURE = 0.07


def view_pair(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Two views [G, B, d]; the second is the first plus noise, because views of one image are alike."""
    view = draw(dims["G"], dims["B"], dims["d"], dtype=dtype, seed=seed)
    noise = draw(dims["G"], dims["B"], dims["d"], dtype=dtype, seed=seed + 1)
    return view, view + noise


def nt_xent(impl: str) -> Function:
    """The library's NT-Xent, mean over groups and rows."""
    return lambda z, z_pair: AF.nt_xent(z, z_pair, temperature=TEMPERATURE, impl=impl)


def nt_xent_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """See the file's head; the similarities' symmetry halves the exponentials too."""
    G, n, d = dims["G"], 2 * dims["B"], dims["d"]
    moved = G * n * d * (3 if training else 1)  # u; u again and du
    return Work((3 if training else 1) * G * n * n * d, moved * itemsize, G * n * n / 2)


NT_XENT = Operator(
    "nt_xent",
    "NT-Xent of G groups of 2B rows",
    view_pair,
    nt_xent,
    nt_xent_work,
    lambda dims: dims["G"] * (2 * dims["B"]) ** 2,
    lambda dims: capped(dims, G=2, B=511),
)


def rows_and_columns(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Rows [R, d], columns [C, d] and the column of each row [R] int64; column i resembles row i."""
    columns = draw(dims["C"], dims["d"], dtype=dtype, seed=seed)
    positive = torch.arange(dims["R"]) % dims["C"]
    return columns[positive] + draw(dims["R"], dims["d"], dtype=dtype, seed=seed + 1), columns, positive


def info_nce(impl: str) -> Function:
    """The library's InfoNCE, mean over rows."""
    return lambda rows, columns, positive: AF.info_nce(
        rows, columns, positive, temperature=INFO_NCE_TEMPERATURE, impl=impl
    )


def info_nce_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """See the file's head."""
    R, C, d = dims["R"], dims["C"], dims["d"]
    moved = (R + C) * d * (3 if training else 1)
    return Work((6 if training else 2) * R * C * d, moved * itemsize, R * C)


INFO_NCE = Operator(
    "info_nce",
    "InfoNCE, R rows against C columns",
    rows_and_columns,
    info_nce,
    info_nce_work,
    lambda dims: dims["R"] * dims["C"],
    lambda dims: capped(dims, R=1023, C=2047),
)
