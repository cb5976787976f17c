"""Triton kernels of anomem: one file per operator, shared tile helpers, one table of tile sizes.

This folder is installed as `anomem.kernels`; it imports torch and triton and nothing of `anomem`. Importing it loads
no kernel: an operator's file is loaded by the operator's first call.

How a kernel file is built
    The formula and its source stand at the top; every tile carries its shape. Tiles are named for what they tile:
    BLOCK_N queries, BLOCK_M prototypes, BLOCK_D features. Kernels (`@triton.jit`) come first, then the functions that
    launch them, with a tile that `anomem.kernels.tuning` chooses, then `specs`, the list of what is compiled ahead of
    time (see `anomem.kernels.inspect`).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

if __name__ != "anomem.kernels":
    raise ImportError("import anomem.kernels, not kernels: the folder is installed under the package's name")

# Rows longer than this do not fit into the registers of one block, where the row normalisation keeps them.
LONGEST_ROW = {"retrieve": 2048, "nt_xent": 1024, "info_nce": 1024}
OPERATORS = {
    "anomem::triton_retrieve_fwd": ("retrieve", "forward"),
    "anomem::triton_retrieve_bwd": ("retrieve", "backward"),
    "anomem::triton_nt_xent_fwd": ("nt_xent", "forward"),
    "anomem::triton_nt_xent_bwd": ("nt_xent", "backward"),
    "anomem::triton_info_nce_fwd": ("info_nce", "forward"),
    "anomem::triton_info_nce_bwd": ("info_nce", "backward"),
}
"""Operator of `anomem.ops` -> (file of this folder, function with the arguments of the operator's schema)."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(operator: str) -> Callable[..., Any]:
    """The function that runs an operator; imports its file.

    Args:
        operator: a key of `OPERATORS`.
    """
    module, function = OPERATORS[operator]
    return getattr(importlib.import_module(f"anomem.kernels.{module}"), function)


def support(operator: str, dtype: torch.dtype, features: int) -> str | None:
    """Why the Triton kernels cannot run an operator on such rows, or None if they can.

    Args:
        operator: "retrieve", "nt_xent" or "info_nce".
        dtype: of the rows.
        features: d, their length.
    """
    if operator not in LONGEST_ROW:
        return f"there is no Triton kernel for {operator}"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if features > LONGEST_ROW[operator]:
        return f"the Triton kernel of {operator} takes rows of length up to {LONGEST_ROW[operator]}, not {features}"
    return None
