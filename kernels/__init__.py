"""Triton kernels of anomem, and the table of the operators that run them.

This folder is installed as `anomem.kernels`; it imports torch and triton and nothing of `anomem`. Importing it loads
no kernel: the first call of an operator loads the operator's file.

The files
    `retrieve`      chooses among `retrieve_flash`, `retrieve_resident` and `retrieve_chunked`; `rows` normalises
    `contrast`      NT-Xent and InfoNCE, by `contrast_rows`, `contrast_forward`, `contrast_backward`, and for long rows
                    and exact float32 `contrast_chunked`
    `nearest`       the nearest prototypes and greedy k-center, by the products of `retrieve_chunked`
    `read`          the read of a filled memory, by the same and by `nearest`
    `primitives`    loads, products, softmax and sizes that these share; `launching` launches, `passes` repeats launches
    `tile_table`    the sizes of tiles; `tile_search` measures others
    `ahead_of_time` compiles all kernels without a GPU: `shipped_kernels` lists them, `kernel_resources` reads one

How a kernel file is built
    The formula and its source stand at the top; every tile carries its shape. Blocks are named for what they tile:
    BLOCK_N queries, BLOCK_M prototypes, BLOCK_D features. Kernels (`@triton.jit`) come first, then the functions that
    launch them with a tile from `tile_search.launch`. A function that is launched is called `…_kernel`: that name is
    what a profiler shows, and, without the ending, the tile table's.
"""

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

if __name__ != "anomem.kernels":
    raise ImportError("import anomem.kernels, not kernels: the folder is installed under the package's name")


class Operator(NamedTuple):
    """The implementation of an operator of `anomem.ops`."""

    module: str
    """A file of this folder."""
    function: str
    """A function of that file, with the arguments of the operator's schema."""
    kernels: tuple[str, ...]
    """All kernels that the function can launch."""


_CONTRAST_FORWARD = ("contrast_scaled_rows_kernel", "contrast_forward_kernel", "contrast_add_splits_kernel")
_CONTRAST_BACKWARD = ("contrast_backward_kernel", "contrast_chunked_weights_kernel", "contrast_row_gradient_kernel")
OPERATORS = {
    "anomem::triton_retrieve_fwd": Operator(
        "retrieve",
        "forward",
        (
            "row_normalize_kernel",
            "retrieve_flash_forward_kernel",
            "retrieve_resident_kernel",
            "retrieve_chunked_softmax_kernel",
        ),
    ),
    "anomem::triton_retrieve_bwd": Operator(
        "retrieve",
        "backward",
        (
            "row_normalize_kernel",
            "row_constant_kernel",
            "retrieve_flash_prototype_sums_kernel",
            "retrieve_flash_query_gradient_kernel",
            "retrieve_chunked_weights_kernel",
            "retrieve_chunked_softmax_backward_kernel",
            "row_normalize_backward_kernel",
        ),
    ),
    "anomem::triton_nearest": Operator("nearest", "nearest", ("nearest_select_kernel",)),
    "anomem::triton_k_center": Operator("nearest", "k_center", ("nearest_center_kernel",)),
    "anomem::triton_read": Operator(
        "read",
        "read",
        ("row_normalize_kernel", "nearest_select_kernel", "read_softmax_kernel", "read_finish_kernel"),
    ),
    "anomem::triton_nt_xent_fwd": Operator("contrast", "nt_xent_forward", _CONTRAST_FORWARD),
    "anomem::triton_nt_xent_bwd": Operator("contrast", "nt_xent_backward", _CONTRAST_BACKWARD),
    "anomem::triton_info_nce_fwd": Operator("contrast", "info_nce_forward", _CONTRAST_FORWARD),
    "anomem::triton_info_nce_bwd": Operator("contrast", "info_nce_backward", _CONTRAST_BACKWARD),
}

# Longer rows do not fit into the registers of one block, where the row normalisation keeps them.
LONGEST_ROW = {"retrieve": 2048, "nearest": 2048, "read": 2048, "nt_xent": 4096, "info_nce": 4096}
_CONTRASTS = ("nt_xent", "info_nce")
OLDEST_CAPABILITY = (8, 0)
TRITON_FOR_10 = (3, 8)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(operator: str) -> Callable[..., Any]:
    """The function that runs an operator; imports its file.

    Args:
        operator: a key of `OPERATORS`.
    """
    module, function, _ = OPERATORS[operator]
    return getattr(_module(module), function)


def run(operator: str, *args: Any) -> Any:
    """`implementation(operator)(*args)`, with prepared launches where the same was run before (`passes`).

    Args:
        operator: a key of `OPERATORS`.
        args: of its schema.
    """
    return _module("passes").run(implementation(operator), *args)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"anomem.kernels.{name}")


def support(operator: str, dtype: torch.dtype, features: int) -> str | None:
    """Why the Triton kernels cannot run an operator on such rows, or None if they can.

    Of a machine with several GPUs the current one is asked.

    Args:
        operator: "retrieve", "nearest", "read", "nt_xent" or "info_nce".
        dtype: of the rows.
        features: d, their length.
    """
    if operator not in LONGEST_ROW:
        return f"there is no Triton kernel for {operator}"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if features > LONGEST_ROW[operator]:
        return f"the Triton kernel of {operator} takes rows of length up to {LONGEST_ROW[operator]}, not {features}"
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or not _has_gpu():
        return None  # the interpreter runs everything; without a GPU nothing can be launched
    device = torch.device("cuda", torch.cuda.current_device())
    return _gpu_obstacle(device) or _tile_obstacle(operator, dtype, features, device)


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()  # asks the driver each time


@functools.cache
def _gpu_obstacle(device: torch.device) -> str | None:
    """Why no kernel of this folder runs on a GPU, or None."""
    if torch.version.hip is not None:
        return "the Triton kernels have tiles for NVIDIA GPUs only, not for AMD's"
    capability = torch.cuda.get_device_capability(device)
    name = "{}.{}".format(*capability)
    if capability < OLDEST_CAPABILITY:
        return f"the Triton kernels need compute capability 8.0 or later; this GPU has {name}"
    if capability[0] == 10 and _triton_release() < TRITON_FOR_10:
        return (
            f"on compute capability {name} Triton before 3.8 can lose a barrier of a product and give wrong numbers "
            f"(triton#9871, pytorch#181248); {importlib.metadata.version('triton')} is installed"
        )
    return None


def _triton_release() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def _tile_obstacle(operator: str, dtype: torch.dtype, features: int, device: torch.device) -> str | None:
    """Why a contrast has no tile on a GPU, or None; what reads a memory is chunked without a tile."""
    if operator not in _CONTRASTS:
        return None
    rows = importlib.import_module("anomem.kernels.contrast_rows")
    reasons = (rows.obstacle(kernel, dtype, features, device) for kernel in ("contrast_forward", "contrast_backward"))
    return next(filter(None, reasons), None)
