"""`python -m anomem.kernels.ahead_of_time`: compile every shipped tile for every architecture without a GPU.

The launchers run with tensors that have no memory, and a recorder in place of the launch: what is compiled is what they
launch. For each kernel, tile and architecture the command prints registers per thread, spilled bytes, shared memory,
blocks per multiprocessor, the matrix instruction and the tensor memory, read from the compiled binary. `--write` stores
them in ahead_of_time.json under Triton's minor version, each with a digest of all that determines the binary: Triton's
release, the source of the kernel and of what it calls, signature, constants, options and architecture. `--check`
compiles again, compares, and exits with status 1 on a fault. Both leave out a kernel whose digest is that of its row;
`--check` compiles a fixed sample of these, and `--all` compiles them all. A fault is

- a register that is spilled inside a loop with a matrix instruction, or a spill of a kernel without matrices, beyond
  those of the committed row; a spill around that loop costs little and is a number of the row;
- a serialised wgmma (ptxas C7510 to C7519), unless the committed row has it too;
- more than 512 columns of tensor memory;
- a matrix instruction that is not the architecture's (HMMA, HGMMA on sm_90, tcgen05 on sm_100), if the kernel
  multiplies matrices, or more multiplications in its loops than the tile has;
- two products that add to one accumulator in a loop on sm_100, where Triton may lose one of them (triton#10821);
- more shared memory than the tile table says, since tiles are chosen by it at run time;
- scratch memory on the GPU, which Python would have to allocate at each launch, even while a CUDA graph is recorded;
- a row that the committed file lacks or that is no longer compiled;
- fewer blocks per multiprocessor than the committed row;
- any other figure than the committed row's where the digest is the same.

Where it is another, registers may differ by any amount that spills nothing and loses no block: they move by up to 50
from one Triton release to the next. A Triton version without committed rows is checked by the rules that need no row.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
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

COMMITTED = Path(__file__).resolve().parent / "ahead_of_time.json"
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "tcgen05", 120: "HMMA"}
ANY_WIDTH = ("retrieve_resident", "retrieve_chunked_weights", "contrast_chunked_weights")
"""Kernels that sum over slices of rows of any length, compiled for 512 features."""
PORTION = 24
"""Kernels that `--write` compiles before it stores their rows: one that was interrupted goes on where it stopped."""
SAMPLE = 60
"""Kernels that `--check` compiles though their digest is that of the committed row."""
# Compiled with the best tile at whole rows only: their other launches resemble those of sm_80.
_IN_BRIEF = (86, 120)
VARIANTS = ("odd", "mixed", "float16", "l2", "raw", "direct")
"""Last words of the keys of further launches: `variant_launches` says what they are."""
# SASS mnemonics, the best of an architecture first.
_MNEMONICS = (("HGMMA", r"\bHGMMA\b"), ("tcgen05", r"\bUTC[A-Z]*MMA\b"), ("HMMA", r"\bHMMA\b"))
# Shared memory in bytes of a multiprocessor, of which each block takes another KiB, and the limit of one block.
_SHARED = {
    80: (164 * 1024, 163 * 1024),
    86: (100 * 1024, 99 * 1024),
    90: (228 * 1024, 227 * 1024),
    100: (228 * 1024, 227 * 1024),
    120: (100 * 1024, 99 * 1024),
}
_THREADS = {80: 2048, 86: 1536, 90: 2048, 100: 2048, 120: 1536}
_REGISTERS, _TENSOR_COLUMNS = 65536, 512
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


class Row(NamedTuple):
    """The resources of one compiled kernel."""

    registers: int
    spills: int
    """Bytes."""
    shared: int
    """Bytes."""
    blocks: int
    """Blocks per multiprocessor, by registers, shared memory and tensor memory."""
    matrix: str
    """"HGMMA", "tcgen05", "HMMA" or "none"."""
    tensor_columns: int
    """Columns of tensor memory (sm_100)."""
    serialised: bool
    """ptxas C7510 to C7519: consecutive wgmma were serialised."""
    scratch: int
    """Bytes of scratch memory on the GPU that each launch needs."""
    loop_spills: int = 0
    """Instructions that access spilled registers in a loop with a matrix instruction; without matrices, anywhere."""
    products: float = 1.0
    """Multiplications of a turn of those loops over those of the tile; 1 where they are not counted (sm_100)."""
    chained: bool = False
    """Two products add to one accumulator in a loop."""
    digest: str = ""
    """Of what was compiled: see `digest_of`."""


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


def compile_row(key: str) -> Row:
    """Compile the kernel of a key afresh and read its binary."""
    spec = shipped()[key]
    return read(*compiled_of(spec), spec)


def compiled_of(spec: Spec) -> tuple[Any, str]:
    """The compiled kernel and the output of ptxas."""
    source = triton.compiler.ASTSource(
        fn=spec.kernel,
        signature=spec.signature,
        constexprs={name: spec.constants[name] for name, kind in spec.signature.items() if kind == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(spec.signature) if name in spec.aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", spec.architecture, 32)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        compiled = triton.compile(source, target=target, options=spec.options)
    return compiled, log.getvalue()


def read(compiled: object, log: str, spec: Spec) -> Row:
    """The Row of a compiled kernel; `log` is the output of ptxas."""
    sass, usage = disassemble(compiled.asm["cubin"])
    loops = Loops(sass, matrix_only=spec.matrix)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    spills = max(spilled, default=0) or int(re.search(r"LOCAL:(\d+)", usage).group(1))
    shared = compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    per_multiprocessor, per_block = _SHARED[spec.architecture]
    threads = 32 * spec.tile.warps
    blocks = min(
        _THREADS[spec.architecture] // threads,
        # Registers are given to warps in units of 256.
        _REGISTERS // (-(-registers * 32 // 256) * 256 * spec.tile.warps),
        per_multiprocessor // (shared + 1024),
        _TENSOR_COLUMNS // columns if columns else 32,
    )
    if shared > per_block:
        blocks = 0
    matrix = next((name for name, pattern in _MNEMONICS if re.search(pattern, sass)), "none")
    serialised = re.search(r"\bC751\d\b", log) is not None
    scratch = sum(getattr(compiled.metadata, f"{kind}_scratch_size") or 0 for kind in ("global", "profile"))
    executed = loops.multiplications(spec.tile.warps)
    expected = multiplications(spec) if executed and spec.matrix else []
    products = 1.0 if not expected or executed in expected else round(executed / expected[0], 3)
    return Row(
        registers, spills, shared, blocks, matrix, columns, serialised, scratch,
        loops.spills if spills else 0, products, chains_products(compiled.asm["ttir"]), digest_of(spec),
    )  # fmt: skip


def digest_of(spec: Spec) -> str:
    """Digest of all that determines a binary; comments, docstrings and the place in a file do not."""
    parts = (triton.__version__, source_of(spec.kernel), spec[:1], spec[2:6])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def source_of(kernel: Any) -> str:
    """The code of a `@triton.jit` function, of those that it calls, and the values of the constants that it names."""
    found: dict[str, str] = {}

    def visit(function: Any) -> None:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
            tree.body = tree.body[1:]
        found[f"{function.__module__}.{function.__name__}"] = ast.dump(tree)
        for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            value = function.__globals__.get(name)
            called = getattr(value, "fn", None)  # of a function of ours, compiled or interpreted
            if isinstance(value, tl.constexpr):
                found[f"{function.__module__}.{name}"] = repr(value.value)
            elif inspect.isfunction(called) and f"{called.__module__}.{called.__name__}" not in found:
                visit(called)

    visit(kernel.fn)
    return repr(sorted(found.items()))


class Loops:
    """The innermost and outer loops of a disassembled kernel that hold a matrix instruction.

    Args:
        sass: of the kernel.
        matrix_only: False takes the whole kernel for a loop.
    """

    def __init__(self, sass: str, matrix_only: bool) -> None:
        labels: dict[str, int] = {}
        self._code: list[str] = []
        for line in sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label.group(1)] = len(self._code)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
                self._code.append(instruction.group(1))
        self._inside = set() if matrix_only else set(range(len(self._code)))
        for end, instruction in enumerate(self._code):
            jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
            begin = labels.get(jump.group(1), end) if jump else end
            body = self._code[begin:end]
            if any(re.search(pattern, line) for _, pattern in _MNEMONICS for line in body):
                self._inside.update(range(begin, end))

    @property
    def instructions(self) -> list[str]:
        """All instructions of these loops, each once."""
        return [self._code[i] for i in sorted(self._inside)]

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(re.search(r"\b(LDL|STL)\b", self._code[i]) is not None for i in self._inside)

    def multiplications(self, warps: int) -> int:
        """Of one turn of every loop, by all warps; 0 where the shapes are not in the mnemonic (sm_100)."""
        total = 0
        for i in self._inside:
            if group := re.search(r"\bHGMMA\.64x(\d+)x(\d+)", self._code[i]):
                total += 64 * int(group.group(1)) * int(group.group(2)) * warps // 4
            elif one := re.search(r"\bHMMA\.(16816|1688|1684)\b", self._code[i]):
                total += 16 * 8 * int(one.group(1)[3:]) * warps
        return total


def multiplications(spec: Spec) -> list[int]:
    """Of one turn of every loop of a tile; several numbers where ptxas may unroll a loop over slices."""
    constants = spec.constants
    name = spec.kernel.__name__
    width = constants.get("FEATURES", constants.get("D"))
    unrolled = range(1, -(-width // constants["BLOCK_D"]) + 1)
    if name == "contrast_forward_kernel":
        return [constants["BLOCK_R"] * constants["BLOCK_C"] * constants["BLOCK_D"] * times for times in unrolled]
    if name == "contrast_backward_kernel":
        return [2 * constants["BLOCK_X"] * constants["BLOCK_Y"] * constants["BLOCK_D"]]
    if name == "contrast_chunked_weights_kernel":
        return [constants["BLOCK_X"] * constants["BLOCK_Y"] * constants["BLOCK_D"] * times for times in unrolled]
    if name == "retrieve_chunked_weights_kernel":
        score = constants["BLOCK_N"] * constants["BLOCK_M"] * constants["BLOCK_D"]
        return [score * times for times in range(1, 4 * unrolled.stop)]  # of two products, in one loop or in two
    if name == "retrieve_resident_kernel":
        score = constants["BLOCK_N"] * constants["BLOCK_M"] * constants["BLOCK_D"]
        return [score * times for times in range(2, 2 * unrolled.stop)] + [score]  # one of two loops may disappear
    keys = constants["BLOCK_D"]
    values = constants["BLOCK_DV"]
    per_score = {
        "retrieve_flash_forward_kernel": keys + values,
        "retrieve_flash_query_gradient_kernel": 2 * keys + values,
        "retrieve_flash_prototype_sums_kernel": (2 * keys + 2 * values, 2 * keys + values, keys + values)[
            constants.get("PART", 0)
        ],
    }
    return [constants["BLOCK_N"] * constants["BLOCK_M"] * per_score[name]]


def chains_products(ttir: str) -> bool:
    """Whether a product adds to the result of another one, in Triton's intermediate code."""
    dots = re.findall(r"(%[\w#]+) = tt\.dot %[\w#]+, %[\w#]+, (%[\w#]+)", ttir)
    results = {result for result, _ in dots}
    return any(accumulator in results for _, accumulator in dots)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(SASS, resource usage) of a binary, by the tools that ship with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([tools / tool, *flags, file.name], check=True, capture_output=True, text=True).stdout
            for tool, flags in (("nvdisasm", ["-c"]), ("cuobjdump", ["-res-usage"]))
        ]
    return outputs[0], outputs[1]


def unlike(committed: dict[str, Row]) -> list[str]:
    """Keys whose committed row is of another binary, or missing."""
    return [key for key, spec in shipped().items() if key not in committed or committed[key].digest != digest_of(spec)]


def sample() -> list[str]:
    """Keys spread over everything that is shipped, always the same: each kernel on each architecture, and others."""
    spread = sorted(shipped(), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    one_each = {(shipped()[key].kernel.__name__, shipped()[key].architecture): key for key in reversed(spread)}
    chosen = list(one_each.values())
    return chosen + [key for key in spread if key not in chosen][: max(SAMPLE - len(chosen), 0)]


def compile_all(keys: list[str], processes: int) -> dict[str, Row]:
    """Compile these, in that many processes, past every cache."""
    with tempfile.TemporaryDirectory() as cache:
        # The processes inherit these and read them when they import triton.
        os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1", TRITON_CACHE_DIR=cache)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            return dict(zip(keys, pool.map(compile_row, keys, chunksize=4), strict=True))


def faults(rows: dict[str, Row], committed: dict[str, Row] | None) -> Iterator[str]:
    """The faults that `--check` reports, one sentence each; the rules stand at the top of this file."""
    for key, row in rows.items():
        spec = shipped()[key]
        before = None if committed is None else committed.get(key)
        if row.loop_spills > (0 if before is None else before.loop_spills):
            yield f"{key}: spills in its loop, {row.loop_spills} instructions ({row.spills} bytes)"
        if row.serialised and not (before is not None and before.serialised):
            yield f"{key}: ptxas serialises its wgmma (C7510 to C7519)"
        if row.products != 1.0:
            yield f"{key}: executes {row.products} times the products of its tile"
        if row.chained and spec.architecture == 100:
            yield f"{key}: two products add to one accumulator, of which Triton may lose one on sm_100"
        if row.blocks < 1:
            yield f"{key}: no block fits a multiprocessor ({row.shared} bytes shared, {row.tensor_columns} columns)"
        if row.shared > spec.tile.shared * 1024:
            yield f"{key}: {row.shared} bytes of shared memory, the tile table says {spec.tile.shared} KiB at most"
        if row.scratch:
            yield f"{key}: {row.scratch} bytes of scratch memory would be allocated at each launch"
        if spec.matrix and row.matrix != MATRIX_INSTRUCTION[spec.architecture]:
            yield f"{key}: multiplies by {row.matrix}, not by {MATRIX_INSTRUCTION[spec.architecture]}"
        if committed is not None:
            if before is None:
                yield f"{key}: not in {COMMITTED.name}; run python -m anomem.kernels.ahead_of_time --write"
            elif row.blocks < before.blocks:
                yield f"{key}: {row.blocks} blocks per multiprocessor, committed {before.blocks}"
            elif row.digest == before.digest and row != before:
                pairs = zip(Row._fields, before, row, strict=True)
                changed = ", ".join(f"{name} {mine}, committed {old}" for name, old, mine in pairs if mine != old)
                yield f"{key}: {changed}, though nothing that determines the binary has changed"
    for key in sorted(set(committed or ()) - set(shipped())):
        yield f"{key}: in {COMMITTED.name} but no longer compiled; run python -m anomem.kernels.ahead_of_time --write"


def committed_rows() -> dict[str, dict[str, Row]]:
    """The committed table: rows by key, by minor version of Triton."""
    if not COMMITTED.exists():
        return {}
    stored = json.loads(COMMITTED.read_text())
    return {release: {key: Row(**row) for key, row in rows.items()} for release, rows in stored.items()}


def write(rows: dict[str, Row]) -> None:
    """Store the rows under the running version of Triton, beside those of other versions."""
    table = committed_rows() | {version(): rows}
    text = ",\n".join(
        f'  "{release}": {{\n'
        + ",\n".join(f"    {json.dumps(key)}: {json.dumps(row._asdict())}" for key, row in sorted(rows.items()))
        + "\n  }"
        for release, rows in sorted(table.items())
    )
    temporary = COMMITTED.with_suffix(f".{os.getpid()}")
    temporary.write_text("{\n" + text + "\n}\n")
    temporary.replace(COMMITTED)


def show(rows: dict[str, Row]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    headings = ("registers", "spilled", "shared KiB", "blocks/SM", "matrix", "tensor memory")
    table = Table("kernel, tile, architecture", title=f"Compiled by Triton {triton.__version__}; nothing was run")
    for heading in headings:
        table.add_column(heading, justify="right")
    for key, row in rows.items():
        shared = f"{row.shared / 1024:.1f}"
        cells = (row.registers, row.spills, shared, row.blocks, row.matrix, row.tensor_columns)
        table.add_row(key, *map(str, cells), style="red" if row.loop_spills or row.serialised else None)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: list[str] | None = None) -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m anomem.kernels.ahead_of_time", description="compile every shipped tile without a GPU"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help=f"store the rows in {COMMITTED.name}")
    action.add_argument("--check", action="store_true", help="exit with status 1 on any fault")
    parser.add_argument("--all", action="store_true", help="also compile what is as it was when its row was committed")
    parser.add_argument("--processes", type=int, default=2, help="compilations at the same time")
    chosen = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled; unset it")
    committed = committed_rows().get(version())
    known = {key: row for key, row in (committed or {}).items() if key in shipped()}
    keys = list(shipped())
    if not chosen.all and known and (chosen.write or chosen.check):
        wanted = {*unlike(known), *(sample() if chosen.check else ())}
        keys = [key for key in keys if key in wanted]
    rows: dict[str, Row] = {}
    portion = PORTION if chosen.write else max(len(keys), 1)
    for first in range(0, len(keys), portion):
        rows |= compile_all(keys[first : first + portion], chosen.processes)
        if chosen.write:
            write(known | rows)
    if chosen.write:
        write(known | rows)
    found = list(faults(rows, None if chosen.write else committed))
    if not chosen.check:
        show(rows)
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{len(rows)} kernels compiled by Triton {triton.__version__}, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
