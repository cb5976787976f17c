"""Every kernel that is shipped, with every tile for every architecture, as `triton.compile` takes it.

The launchers run with tensors that have no memory, and a recorder in place of the launch: what is listed is what they
launch. Nothing is compiled here; `kernel_resources` compiles one, `ahead_of_time` all.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from anomem.kernels import (
    TRITON_FOR_10,
    contrast,
    contrast_backward,
    contrast_chunked,
    contrast_forward,
    contrast_rows,
    nearest,
    retrieve,
    retrieve_chunked,
    retrieve_flash,
    rows,
)
from anomem.kernels import read as memory_read
from anomem.kernels.primitives import Memory
from anomem.kernels.tile_search import Fixed, Launched, Site, using
from anomem.kernels.tile_table import ARCHITECTURES, INTERPRETED, TABLE, Tile, tiles_of

ANY_WIDTH = ("retrieve_resident", "retrieve_chunked_weights", "contrast_chunked_weights")
"""Kernels that sum over slices of rows of any length, compiled for 512 features."""
# Compiled with the best tile at whole rows only: their other launches resemble those of sm_80.
_IN_BRIEF = (86, 120)
VARIANTS = ("odd", "mixed", "float16", "l2", "raw", "direct")
"""Last words of the keys of further launches: `variant_launches` says what they are."""
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: Any
    """The `@triton.jit` function."""
    arguments: dict[str, Any]
    """In the order of the kernel."""
    options: dict[str, Any]
    """num_warps and others; Triton's defaults if absent."""


class Spec(NamedTuple):
    """One kernel with one tile for one architecture, as `triton.compile` takes it."""

    architecture: int
    kernel: Any
    """The `@triton.jit` function."""
    signature: dict[str, str]
    """Every argument in order: "*bf16", "*fp32", "i32", "fp32", or "constexpr"."""
    constants: dict[str, Any]
    """Values of the constexpr arguments and of absent (None) tensors."""
    aligned: tuple[str, ...]
    """Arguments taken as multiples of 16, as in the launches that matter: pointers and integers named *stride."""
    options: dict[str, Any]
    tile: Tile
    matrix: bool
    """Whether it multiplies matrices: then losing the architecture's matrix instruction is a failure."""


def version() -> str:
    """The minor version of Triton, such as "3.8", under which rows are committed."""
    return ".".join(triton.__version__.split(".")[:2])


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches of Triton kernels are recorded and run nothing."""
    launches: list[Launch] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*positional: Any, **options: Any) -> None:
            options |= dict(zip(kernel.arg_names, positional, strict=False))
            arguments = {name: options.pop(name) for name in kernel.arg_names}
            for name, value in arguments.items():
                arguments[name] = value.value if isinstance(value, tl.constexpr) else value
            launches.append(Launch(kernel, arguments, options))

        return record

    with patch.object(KernelInterface, "__getitem__", launcher):
        yield launches


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def retrieve_calls(
    dtype: torch.dtype, d: int, prototypes: int, dv: int | None, normalize: int = rows.LAYER.value
) -> None:
    """Retrieval, forward and backward, with a learned beta and a gradient of lse; dv is None for a tied memory."""
    query, dout, keys = (empty(*shape, dtype=dtype) for shape in ((100, d), (100, dv or d), (prototypes, d)))
    arguments = query, keys, None if dv is None else empty(prototypes, dv, dtype=dtype), empty(), 1.0, normalize
    retrieve.backward(dout, empty(100), *arguments, *retrieve.forward(*arguments))


def contrast_calls(dtype: torch.dtype, d: int, batch: int, learned: bool, groups: tuple[int, int] = (1, 8)) -> None:
    """NT-Xent and InfoNCE with an exclusion, forward in splits and backward without.

    With a constant temperature the backward of InfoNCE is left out: it is the learned one without a moment. `groups` of
    the forward and of the backward: with 8 there are so many blocks that the streamed rows are not split.
    """
    temperature, index = empty() if learned else None, empty(2 * batch, dtype=torch.int64)
    view, matrix = empty(groups[0], batch, d, dtype=dtype), empty(groups[0], 2 * batch, d, dtype=dtype)
    contrast.nt_xent_forward(view, view, temperature, 0.2)
    contrast.info_nce_forward(matrix, matrix, index, index, temperature, 0.2)
    width = contrast_rows.whole_vectors(d, dtype)
    matrix, row = empty(groups[1], 2 * batch, width, dtype=dtype), empty(groups[1], 2 * batch)
    contrast.nt_xent_backward(row, row, row, matrix, row, temperature, 0.2, d)
    if learned:
        contrast.info_nce_backward(row, row, row, matrix, matrix, row, row, index, index, temperature, 0.2, d)


def row_calls(d: int) -> None:
    """The row passes of retrieval in bfloat16."""
    matrix = empty(100, d, dtype=torch.bfloat16)
    rows.normalized(matrix, rows.LAYER.value)
    rows.normalized_backward(empty(2, 100, d), matrix, rows.LAYER.value, matrix)
    rows.row_constant(matrix, matrix, empty(100))


def contrast_row_calls(d: int) -> None:
    """The row passes of the contrastive losses in bfloat16."""
    matrix, row = empty(8, 100, d, dtype=torch.bfloat16), empty(8, 100)
    contrast_rows.scaled_rows(matrix, matrix, row, matrix, matrix, row)
    for scale in (None, (row[:, 0], empty(), 1.0)):
        contrast_rows.row_gradient(empty(2, 8, 100, d), contrast_rows.Inputs(matrix, row, (matrix, matrix)), scale)


def exact_calls(d: int) -> None:
    """The passes over the library's products of the contrastive losses in exact float32."""
    with tf32(False):
        contrast_calls(torch.float32, d, 64, learned=True)


def chunked_calls(prototypes: int) -> None:
    """The softmax passes of the chunked scheme: forward in bfloat16, backward in float32."""
    query, keys = empty(100, 64, dtype=torch.bfloat16), empty(prototypes, 64, dtype=torch.bfloat16)
    retrieve_chunked.forward(query, Memory(keys, None, None, 1.0, rows.NONE.value))
    query, memory = query.float(), Memory(keys.float(), None, None, 1.0, rows.NONE.value)
    retrieve_chunked.backward(query, empty(100), query, memory, query, empty(100, 2))


def nearest_calls(prototypes: int) -> None:
    """The nearest prototypes and k-center in bfloat16."""
    matrix = empty(100, 128, dtype=torch.bfloat16)
    nearest.nearest(matrix[None], empty(1, prototypes, 128, dtype=torch.bfloat16), 4)
    nearest.k_center(matrix, 1, 0)


def read_calls(prototypes: int) -> None:
    """The read of the largest scores in bfloat16, with bias and beta."""
    query, keys = empty(1, 100, 128, dtype=torch.bfloat16), empty(1, prototypes, 128, dtype=torch.bfloat16)
    memory_read.read(query, keys, empty(), 1.0, empty(1, prototypes), rows.LAYER.value, 4, False, True)


def table_launches(architecture: int) -> Iterator[tuple[str, Tile, Launch]]:
    """(kind, tile, launch) of every tile of the table, with all that a call can have.

    At rows that fill their blocks, and at rows that leave a rest, which needs masks.
    """
    for kernel, kind, block in TABLE:
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        resident = kernel == "retrieve_resident"
        widest = 512 if kernel in ANY_WIDTH else block
        brief = architecture in _IN_BRIEF
        for tile in tiles_of((kernel, kind, block), architecture)[: 1 if brief else None]:
            for d in (widest,) if brief else (widest, widest - 8):
                with (
                    tf32(kind == "tf32"),
                    using(Fixed(kernel, tile)),
                    patch.object(retrieve_flash, "architecture_of", lambda device: architecture),
                    recording() as launches,
                ):
                    if kernel.startswith("retrieve"):
                        for dv in (d,) if resident else (None,) if brief else (None, d):
                            retrieve_calls(dtype, d, block, dv)
                    else:
                        contrast_calls(dtype, d, tile.rows, learned=True)
                        if d == widest and not brief:  # with the fixed shift; see `has_fixed_shift`
                            contrast_calls(dtype, d, tile.rows, learned=False)
                for launch in launches:
                    if launch.kernel.__name__ == f"{kernel}_kernel":
                        yield kind, tile, launch


class Best:
    """A choice of the best tile of the table for an architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.tiles: dict[str, Tile] = {}
        """By the kernel's name in the table."""

    def tile(self, site: Site, run: Callable[[Tile], Launched]) -> Tile:
        """The tile to launch with."""
        found = tiles_of(site.entry, self.architecture)
        if found:
            self.tiles[site.entry[0]] = found[0]
        return found[0] if found else INTERPRETED


def variant_launches(architecture: int) -> Iterator[tuple[str, Tile, Launch]]:
    """(word, tile, launch) of launches beside those of `table_launches`, with the best tile of the table.

    odd: rows of odd length; mixed: values shorter than keys; float16: with scaled weights; l2, raw: the other
    normalisations; direct: a contrast's forward without splits, its backward with them.
    """
    half = torch.bfloat16
    calls: tuple[tuple[str, Callable[[], None]], ...] = (
        ("odd", lambda: retrieve_calls(half, 33, 64, None)),
        ("odd", lambda: contrast_calls(half, 99, 64, True)),
        ("odd", lambda: retrieve_calls(half, 301, 300, None)),
        ("odd", lambda: contrast_calls(half, 301, 64, True)),
        ("mixed", lambda: retrieve_calls(half, 128, 64, 40)),
        ("mixed", lambda: retrieve_calls(half, 300, 300, 520)),
        ("float16", lambda: contrast_calls(torch.float16, 128, 64, True)),
        ("float16", lambda: contrast_calls(torch.float16, 512, 64, True)),
        ("l2", lambda: retrieve_calls(half, 128, 64, None, rows.L2.value)),
        ("raw", lambda: retrieve_calls(half, 128, 64, None, rows.NONE.value)),
        ("direct", lambda: contrast_calls(half, 128, 64, True, (8, 1))),
    )
    for word, call in calls:
        best = Best(architecture)
        with (
            patch.object(retrieve_flash, "architecture_of", lambda device: architecture),
            patch.object(contrast_backward, "architecture_of", lambda device: architecture),
            using(best),
            recording() as launches,
        ):
            call()
        for launch in launches:
            tile = best.tiles.get(launch.kernel.__name__.removesuffix("_kernel"))
            normalises = "NORMALIZE" in launch.arguments
            if tile is not None and (normalises or word not in ("l2", "raw")):
                yield word, tile, launch


def pass_launches() -> Iterator[tuple[str, Tile, Launch]]:
    """(dtype, block as a tile, launch) of the passes that multiply no matrices, at short and at the longest rows."""
    passes = (
        *((row_calls, "row", width, (rows.rows_per_block(width), width)) for width in (64, 256, 2048)),
        *((contrast_row_calls, "contrast", width, (rows.rows_per_block(width), width)) for width in (128, 4096)),
        *((chunked_calls, "retrieve_chunked_softmax", M, retrieve_chunked.block_of_scores(M)) for M in (64, 4096)),
        (nearest_calls, "nearest", 1024, retrieve_chunked.block_of_scores(1024)),
        (read_calls, "read", 1024, retrieve_chunked.block_of_scores(1024)),
    )
    for calls, prefix, size, block in passes:
        with recording() as launches:
            calls(size)
        for launch in launches:
            if launch.kernel.__name__.startswith(prefix):
                yield "bf16", Tile(*block, warps=4, stages=3, shared=2), launch
    with recording() as launches:
        exact_calls(64)
    for launch in launches:
        name = launch.kernel.__name__.removesuffix("_kernel")
        if name in ("contrast_forward", "contrast_chunked_weights"):
            yield "exact", contrast_forward.EXACT if name == "contrast_forward" else contrast_chunked.PASS, launch


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, float32 products round their operands to TF32, or do not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def variant(arguments: dict[str, Any]) -> str:
    """What a launch computes, in the words of a row's key."""
    words = ""
    if "ROLE" in arguments:
        words = ("joined", "rows", "columns")[arguments["ROLE"]]
    elif "PART" in arguments:
        words = ("tied", "keys", "values")[arguments["PART"]]
    elif "positive" in arguments:
        words = "joined" if arguments["positive"] is None else "rectangle"
    elif "TIED" in arguments:
        words = "tied" if arguments["TIED"] else "separate"
    elif "SUMS_OF_WEIGHTS" in arguments:
        words = "of weights" * arguments["SUMS_OF_WEIGHTS"]
    elif "BLOCK_DV" in arguments:
        words = "tied" if arguments["values"] is None else "separate"
    return words + " fixed" * arguments.get("FIXED", False)


def spec_of(launch: Launch, architecture: int, tile: Tile, matrix: bool) -> Spec:
    """The compilation that a launch needs."""
    parameters = inspect.signature(launch.kernel.fn).parameters
    signature, constants = {}, {}
    for name, value in launch.arguments.items():
        if value is None or parameters[name].annotation is tl.constexpr:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = _TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
    unspecialised = getattr(launch.kernel, "do_not_specialize", None) or ()  # the interpreter's kernels have none
    # Rows that leave a rest (d − 8) stand for rows of a wider matrix: their stride counts as a multiple of 16.
    aligned = tuple(
        name
        for name, kind in signature.items()
        if kind.startswith("*")
        or (name.endswith("stride") and name not in unspecialised and launch.arguments[name] % 8 == 0)
    )
    return Spec(architecture, launch.kernel, signature, constants, aligned, launch.options, tile, matrix)


@functools.cache
def shipped() -> dict[str, Spec]:
    """Everything that is compiled, by the key of its committed row; without the architecture that `support` refuses."""
    specs: dict[str, Spec] = {}
    refused = (100,) if tuple(map(int, version().split("."))) < TRITON_FOR_10 else ()
    for architecture in sorted({*ARCHITECTURES} - {*refused}):
        launches = [*table_launches(architecture)]
        if architecture not in _IN_BRIEF:
            launches += [*pass_launches(), *variant_launches(architecture)]
        for kind, tile, launch in launches:
            kernel, arguments = launch.kernel.__name__.removesuffix("_kernel"), launch.arguments
            width = arguments.get("D", arguments.get("FEATURES"))
            further = kind in VARIANTS
            words = (kernel, variant(arguments), "half" if further else kind, f"d{width}" if width else "")
            places = (f"{tile.rows}x{tile.columns}", f"sm_{architecture}", kind if further else "")
            key = " ".join(word for word in (*words, *places) if word)
            if key in specs:
                raise ValueError(f"two launches have the key {key!r}")
            specs[key] = spec_of(launch, architecture, tile, matrix=kind in ("half", "tf32", *VARIANTS))
    return specs
