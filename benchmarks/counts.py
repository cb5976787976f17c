"""Kernels launched and memory taken by a call on a GPU, counted without a GPU.

`python -m benchmarks.counts` runs every implementation on the fake GPUs of `tests/stand_in`: torch's allocator, its
dispatcher, the compilers and the launchers are the real ones, the kernels compute nothing. The counts are therefore
those of an H100 with 132 multiprocessors. A product by cuBLAS counts as one kernel, a fill or a copy as none. Times are
not measured. An implementation that reads computed values on the host is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.harness import rows
from benchmarks.harness.case import Case, Implementation, case
from benchmarks.harness.console import say
from benchmarks.harness.measure import peak_bytes
from benchmarks.harness.prepare import Subject, reasons
from benchmarks.harness.rows import NoTime, Row
from benchmarks.operators import OPERATORS
from benchmarks.rivals import implementations
from benchmarks.suites import kernels
from tests.stand_in import recording
from tests.stand_in.start import start

GPU_BYTES = 80 * 2**30  # of a fake GPU
SUITE = "counts"
RESULT = rows.RESULTS / f"cuda-{SUITE}.jsonl"


def cases() -> Iterator[Case]:
    """The cases of the suite `kernels` as on a GPU, and two sweeps to sizes at which plain PyTorch does not fit."""
    yield from kernels("cuda").cases
    for batch in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        yield case("nt_xent", G=1, B=batch, d=128, dtype="bfloat16", group="over B")
    for thousands in (16, 64, 256, 1024, 4096):
        yield case("retrieve", N=thousands * 1024, M=4096, d=128, B=128, dtype="bfloat16", group="over N")


def count(case: Case, implementation: Implementation) -> Row:
    """Count one call of one implementation, after calls that compile and plan."""
    result = rows.row_for(SUITE, case, implementation.name, rows.WORK, rows.COUNTED)
    torch.compiler.reset()  # after many sizes a function is compiled for any size, or no more
    try:
        with reasons():
            function = implementation.build(case, "cuda")
            inputs = OPERATORS[case.operator].inputs(case.dims, case.torch_dtype, 0)
            inputs = tuple(x.cuda().requires_grad_(case.training and x.is_floating_point()) for x in inputs)
            subject = Subject(case, function, "cuda", [inputs])
            for _ in range(2):
                subject.call()
            with recording.recorded() as entries:
                subject.call()
            if recording.of(entries, "wait", "download"):
                raise NoTime(rows.UNAVAILABLE, "reads computed values on the host, on which its sizes may depend")
            result.launches = len(recording.of(entries, "launch"))
            result.peak_bytes = peak_bytes(subject.call, "cuda")
    except NoTime as none:
        result.status, result.reason = none.status, none.reason
    torch.cuda.empty_cache()
    return result


@dataclass(frozen=True)
class Options:
    """Count launches and memory of every implementation without a GPU."""

    filter: str = ""
    """Only cases whose title contains this."""
    json: Path = RESULT
    """File of rows, written when all are counted."""
    keep: tuple[str, ...] = ()
    """Take the rows that the file has from these commits, and count the others."""


def _counted(row: Row) -> tuple[object, ...]:
    """What a row counts, at any state of the code."""
    return row.operator, *sorted(row.shape.items()), row.dtype, row.training, row.group, row.implementation


def main(options: Options) -> int:
    """Count, print and write."""
    if options.filter and options.json == RESULT:
        say("--filter leaves cases out: name another file with --json")
        return 2
    partial = options.json.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    kept = {_counted(row): row for row in rows.read(options.json) if row.about["commit"] in options.keep}
    missing = set(options.keep) - {row.about["commit"] for row in kept.values()}
    if missing:
        say(f"{options.json} has no rows from {', '.join(sorted(missing))}")
        return 2
    for each in cases():
        if options.filter not in each.title:
            continue
        say(each.title)
        for implementation in implementations(each.operator):
            known = kept.get(_counted(rows.row_for(SUITE, each, implementation.name, rows.WORK, rows.COUNTED)))
            if known is not None:
                rows.append(partial, known)
                continue
            row = count(each, implementation)
            row.about = rows.about("cuda")
            rows.append(partial, row)
            if row.status == rows.COUNTED:
                assert row.peak_bytes is not None
                say(f"  {row.implementation}: {row.launches} launches, {row.peak_bytes / 2**20:.1f} MiB")
            elif row.status != rows.UNAVAILABLE:
                say(f"  {row.implementation}: {row.status}, {row.reason}")
    partial.replace(options.json)
    return 0


if __name__ == "__main__":
    if not recording.present():
        start("-m", "benchmarks.counts", *sys.argv[1:])
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.counts")))
