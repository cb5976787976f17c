"""`python -m anomem.kernels.inspect`: compile every shipped tile for sm_80, sm_90 and sm_100 without a GPU, and look.

For each kernel, tile and architecture it prints registers per thread, spilled bytes, shared memory, blocks per
multiprocessor, the matrix instruction and the tensor memory, read from the compiled binary. `--write` stores them in
inspect.json under Triton's minor version; `--check` compiles again, compares, and exits with status 1 on

- a spill, a serialised wgmma (ptxas C7511, C7515) or more than 512 columns of tensor memory, whatever the file says;
- a matrix instruction that is not the architecture's (HMMA on sm_80, HGMMA on sm_90, tcgen05 on sm_100) where the
  kernel multiplies matrices;
- more shared memory than the tile table says, which is how tiles are chosen at run time;
- memory of the GPU that Python would have to allocate at each launch, where a CUDA graph may be recording;
- a row that the committed file lacks or that is no longer compiled;
- fewer blocks per multiprocessor than the committed row.

Registers may differ by any amount that spills nothing and loses no block: they move by up to 50 from one Triton
release to the next. A Triton version without committed rows is held to the rules that need no row.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

import anomem.kernels
from anomem.kernels.specs import Spec
from anomem.kernels.tiles import ARCHITECTURES

TABLE = Path(__file__).resolve().parent / "inspect.json"
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "tcgen05"}
# SASS mnemonics, the best of an architecture first.
_MNEMONICS = (("HGMMA", r"\bHGMMA\b"), ("tcgen05", r"\bUTC[A-Z]*MMA\b"), ("HMMA", r"\bHMMA\b"))
# Per multiprocessor: shared memory in bytes (each block takes another KiB), and what one block may use.
_SHARED = {80: (164 * 1024, 163 * 1024), 90: (228 * 1024, 227 * 1024), 100: (228 * 1024, 227 * 1024)}
_REGISTERS, _TENSOR_COLUMNS = 65536, 512


class Row(NamedTuple):
    """What one compiled kernel needs."""

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
    """ptxas reports C7511 or C7515: wgmma waits for each other."""
    scratch: int
    """Bytes of the GPU's memory that each launch needs beside the kernel's arguments."""


def version() -> str:
    """The committed table has rows per minor version of Triton, "3.8"."""
    return ".".join(triton.__version__.split(".")[:2])


def shipped() -> Iterator[tuple[str, int, Spec]]:
    """(key of the table, architecture, what to compile) of every kernel file that lists its specs."""
    for module in pkgutil.iter_modules(anomem.kernels.__path__):
        if module.name == "inspect":
            continue
        specs = getattr(importlib.import_module(f"anomem.kernels.{module.name}"), "specs", None)
        if specs is None:
            continue
        for architecture in ARCHITECTURES:
            for spec in specs(architecture):
                yield f"{spec.name} sm_{architecture}", architecture, spec


def compile_row(key: str) -> Row:
    """Compile the kernel of a key afresh and read its binary."""
    architecture, spec = next((a, s) for k, a, s in shipped() if k == key)
    source = triton.compiler.ASTSource(
        fn=spec.kernel,
        signature=spec.signature,
        constexprs={name: spec.constants[name] for name, kind in spec.signature.items() if kind == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(spec.signature) if name in spec.aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        compiled = triton.compile(source, target=target, options=spec.tile.options)
    return read(compiled, log.getvalue(), spec, architecture)


def read(compiled: object, log: str, spec: Spec, architecture: int) -> Row:
    """A Row from a compiled kernel and what ptxas said."""
    sass, usage = disassemble(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    spills = max(spilled, default=0) or int(re.search(r"LOCAL:(\d+)", usage).group(1))
    shared = compiled.metadata.shared
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    per_multiprocessor, per_block = _SHARED[architecture]
    threads = 32 * spec.tile.warps
    blocks = min(
        2048 // threads,
        # Registers are given to warps in units of 256.
        _REGISTERS // (-(-registers * 32 // 256) * 256 * spec.tile.warps),
        per_multiprocessor // (shared + 1024),
        _TENSOR_COLUMNS // columns if columns else 32,
    )
    if shared > per_block:
        blocks = 0
    matrix = next((name for name, pattern in _MNEMONICS if re.search(pattern, sass)), "none")
    serialised = "C7511" in log or "C7515" in log
    scratch = sum(getattr(compiled.metadata, f"{kind}_scratch_size") or 0 for kind in ("global", "profile"))
    return Row(registers, spills, shared, blocks, matrix, columns, serialised, scratch)


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


def inspect(processes: int) -> dict[str, Row]:
    """Compile everything that is shipped, in that many processes, past every cache."""
    keys = [key for key, _, _ in shipped()]
    if len(keys) != len(set(keys)):
        raise ValueError(f"two specs share a name: {sorted(key for key in keys if keys.count(key) > 1)}")
    with tempfile.TemporaryDirectory() as cache:
        # Inherited by the processes, which read them when they import triton.
        os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1", TRITON_CACHE_DIR=cache)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            return dict(zip(keys, pool.map(compile_row, keys, chunksize=4), strict=True))


def faults(rows: dict[str, Row], committed: dict[str, Row] | None) -> Iterator[str]:
    """What `--check` objects to, one sentence each; the rules stand at the top of this file."""
    specs = {key: (architecture, spec) for key, architecture, spec in shipped()}
    for key, row in rows.items():
        architecture, spec = specs[key]
        if row.spills:
            yield f"{key}: spills {row.spills} bytes"
        if row.serialised:
            yield f"{key}: ptxas serialises its wgmma (C7511 or C7515)"
        if row.blocks < 1:
            yield f"{key}: no block fits a multiprocessor ({row.shared} bytes shared, {row.tensor_columns} columns)"
        if row.shared > spec.tile.shared * 1024:
            yield f"{key}: {row.shared} bytes of shared memory, the tile table says {spec.tile.shared} KiB at most"
        if row.scratch:
            yield f"{key}: {row.scratch} bytes of the GPU's memory would be allocated at each launch"
        if spec.matrix and row.matrix != MATRIX_INSTRUCTION[architecture]:
            yield f"{key}: multiplies by {row.matrix}, not by {MATRIX_INSTRUCTION[architecture]}"
        if committed is not None:
            before = committed.get(key)
            if before is None:
                yield f"{key}: not in {TABLE.name}; run python -m anomem.kernels.inspect --write"
            elif row.blocks < before.blocks:
                yield f"{key}: {row.blocks} blocks per multiprocessor, committed {before.blocks}"
    for key in sorted(set(committed or ()) - set(rows)):
        yield f"{key}: in {TABLE.name} but no longer compiled; run python -m anomem.kernels.inspect --write"


def committed_rows() -> dict[str, dict[str, Row]]:
    """The committed table: rows by key, by minor version of Triton."""
    if not TABLE.exists():
        return {}
    stored = json.loads(TABLE.read_text())
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
    TABLE.write_text("{\n" + text + "\n}\n")


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
        table.add_row(key, *map(str, cells), style="red" if row.spills or row.serialised else None)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: list[str] | None = None) -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m anomem.kernels.inspect", description="compile every tile and look")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help=f"store the rows in {TABLE.name}")
    action.add_argument("--check", action="store_true", help="exit with status 1 on any fault")
    parser.add_argument("--processes", type=int, default=2, help="compilations at the same time")
    chosen = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled; unset it")
    rows = inspect(chosen.processes)
    found = list(faults(rows, None if chosen.write else committed_rows().get(version())))
    if chosen.write:
        write(rows)
    if not chosen.check:
        show(rows)
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{len(rows)} kernels compiled by Triton {triton.__version__}, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
