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
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

from anomem.kernels.kernel_resources import MATRIX_INSTRUCTION, Row, compiled_of, digest_of, read
from anomem.kernels.shipped_kernels import shipped, version

COMMITTED = Path(__file__).resolve().parent / "ahead_of_time.json"
PORTION = 24
"""Kernels that `--write` compiles before it stores their rows: one that was interrupted goes on where it stopped."""
SAMPLE = 60
"""Kernels that `--check` compiles though their digest is that of the committed row."""


def unlike(committed: dict[str, Row]) -> list[str]:
    """Keys whose committed row is of another binary, or missing."""
    return [key for key, spec in shipped().items() if key not in committed or committed[key].digest != digest_of(spec)]


def sample() -> list[str]:
    """Keys spread over everything that is shipped, always the same: each kernel on each architecture, and others."""
    spread = sorted(shipped(), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    one_each = {(shipped()[key].kernel.__name__, shipped()[key].architecture): key for key in reversed(spread)}
    chosen = list(one_each.values())
    return chosen + [key for key in spread if key not in chosen][: max(SAMPLE - len(chosen), 0)]


def compile_row(key: str) -> Row:
    """Compile the kernel of a key afresh and read its binary."""
    spec = shipped()[key]
    return read(*compiled_of(spec), spec)


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
