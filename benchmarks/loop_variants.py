"""Two changes of the forward loops that were compiled and not taken: `python -m benchmarks.loop_variants`.

    rescale    the running maximum, and with it the accumulator, changes only where a row's maximum rose by 2^8
               (FlashAttention-4)
    factors    the columns' factors are loaded once a block and reach the threads through shared memory, instead of
               one load a column and thread

Compiles the shipped tiles with and without the change, without a GPU, and prints the machine code of the loops with
products as a table in Markdown. Arguments are the names of changes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from anomem import kernels
from anomem.kernels.kernel_resources import Loops, compiled_of, disassemble, read
from anomem.kernels.shipped_kernels import shipped
from benchmarks.harness.console import say

KERNELS = Path(kernels.__file__).parent
COUNTED = {
    "all": r".",
    "loads": r"\bLD(G|GSTS)\b",
    "shared": r"\b(LDS|STS|LDSM|STSM)\b",
    "float": r"\b(FMUL|FFMA|FADD|FMNMX)\b",
    "exp2": r"\bMUFU\.EX2\b",
    "branches": r"\bBRA\b",
    "barriers": r"\bBAR\b",
}
"""Instructions of the loops, by mnemonic."""


class Change(NamedTuple):
    """A text of kernels that is replaced by another."""

    name: str
    file: str
    replaced: tuple[tuple[str, str], ...]
    kernel: str
    """The kernel that is compiled."""
    keys: tuple[str, ...]
    """Patterns of the keys of the shipped tiles."""


_RESCALE = (
    (
        "weights, running_max, running_sum, shift, rescale = "
        "online_softmax(scores, steepness, running_max, running_sum)\n",
        "largest = tl.max(scores, axis=1)\n"
        "        rose = (largest - running_max) * steepness > 8.0\n"
        "        previous_max = running_max\n"
        "        running_max = tl.where(rose, largest, running_max)\n"
        "        shift = tl.where(tl.abs(running_max) == float('inf'), 0.0, running_max)\n"
        "        weights = tl.exp2((scores - shift[:, None]) * steepness)\n"
        "        if tl.max(rose.to(tl.int32), axis=0) > 0:\n"
        "            rescale = tl.exp2((previous_max - shift) * steepness)\n"
        "            running_sum = running_sum * rescale\n"
        "            accumulator = accumulator * rescale[:, None]\n"
        "        running_sum += tl.sum(weights, axis=1)\n",
    ),
    ("accumulator * rescale[:, None], PRECISION)", "accumulator, PRECISION)"),
)
_FACTORS = (
    (
        "y_factor = load_mantissa(column_inverse + group * column_count, columns, column_count)",
        "fours = first + tl.arange(0, BLOCK_C // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]\n"
        "        y_factor = load_mantissa(column_inverse + group * column_count, fours, column_count)\n"
        "        y_factor = tl.reshape(y_factor, (BLOCK_C,))",
    ),
)
CHANGES = (
    Change(
        "rescale",
        "retrieve_flash.py",
        _RESCALE,
        "retrieve_flash_forward_kernel",
        (r"^retrieve_flash_forward tied half d(64|128|256) \S+ sm_(80|90|100)$",),
    ),
    Change(
        "factors",
        "contrast_forward.py",
        _FACTORS,
        "contrast_forward_kernel",
        (r"^contrast_forward joined (fixed )?half d128 64x64 sm_(80|90|100)$",),
    ),
)


def changed(change: Change, folder: Path) -> ModuleType:
    """The file with the change, as a module of its own: Triton reads the source of a kernel from a file."""
    text = (KERNELS / change.file).read_text(encoding="utf-8")
    for old, new in change.replaced:
        if text.count(old) != 1:
            raise ValueError(f"{change.file} does not have once: {old}")
        text = text.replace(old, new)
    path = folder / f"{change.name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"changed_{change.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(spec: Any) -> dict[str, int]:
    """Registers, spilled bytes and the instructions of the loops."""
    compiled, log = compiled_of(spec)
    row = read(compiled, log, spec)
    sass, _ = disassemble(compiled.asm["cubin"])
    code = Loops(sass, matrix_only=True).instructions
    counts = {name: sum(re.search(pattern, one) is not None for one in code) for name, pattern in COUNTED.items()}
    return {"registers": row.registers, "spilled bytes": row.spills, "blocks": row.blocks, **counts}


def table(names: list[str]) -> Iterator[str]:
    """Lines of Markdown: each figure as it is and with the change; all changes without names."""
    header = ["change", "kernel", "registers", "spilled bytes", "blocks", *COUNTED]
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    with tempfile.TemporaryDirectory() as folder:
        for change in CHANGES:
            if names and change.name not in names:
                continue
            kernel = getattr(changed(change, Path(folder)), change.kernel)
            for key, spec in shipped().items():
                if not any(re.search(pattern, key) for pattern in change.keys):
                    continue
                before, after = figures(spec), figures(spec._replace(kernel=kernel))
                cells = [str(n) if n == after[name] else f"{n} → {after[name]}" for name, n in before.items()]
                yield f"| {change.name} | {key} | {' | '.join(cells)} |"


def main() -> int:
    """Print the table."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1", TRITON_CACHE_DIR=cache)
        for line in table(sys.argv[1:]):
            say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
