"""Compiles one kernel for an architecture without a GPU and reads its resources from the binary.

Registers, spills, shared memory, the matrix instruction and what its loops multiply: a `Row`, which also holds a digest
of all that determines the binary. `python -m anomem.kernels.ahead_of_time` does so for every shipped kernel.
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import io
import re
import subprocess
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl

from anomem.kernels.shipped_kernels import Spec

MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "tcgen05", 120: "HMMA"}
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
