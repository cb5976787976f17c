"""Host time of a call on a GPU, measured without one.

`python -m benchmarks.host_time --base REV` runs on the fake GPUs of `tests/stand_in`, whose kernels compute nothing.
What remains of a call is the host's work: Python, the dispatcher, the allocator, autograd, the launches. Its processor
time bounds small calls without a CUDA graph. A real driver takes longer for each launch of every implementation. The
processes, of the working tree and of another revision, take turns, so all see the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.harness import rows
from benchmarks.harness.case import Case, case
from benchmarks.harness.console import say
from benchmarks.harness.prepare import Subject
from benchmarks.operators import OPERATORS
from benchmarks.rivals import implementations
from tests.stand_in import recording
from tests.stand_in.start import start

SUITE = "host"
RESULT = rows.RESULTS / f"cuda-{SUITE}.jsonl"
NATIVE = ("gather", "variance")
"""Operators whose GPU kernels are CUDA C++; those of the others are Triton's."""
CALLS = 20
"""Of one turn."""
# `anomem` must be imported from the revision's folder before `benchmarks` is from this project's.
START = """
import sys
_, folder, root = sys.argv
sys.path[0] = folder
import anomem
assert anomem.__file__.startswith(folder), f"anomem came from {anomem.__file__}, not from {folder}"
sys.path[0] = root
from benchmarks.host_time import serve
serve()
"""


def cases() -> list[Case]:
    """Calls whose kernels are short: the operators of AnoMem at their smallest scale."""
    return [
        case("retrieve", N=8192, M=64, d=128, B=1024, dtype="bfloat16", group="one read"),
        case("retrieve", N=8192, M=64, d=128, B=1024, dtype="float32", group="one read"),
        case("nt_xent", G=8, B=128, d=128, dtype="bfloat16", group="one loss"),
        case("nt_xent", G=8, B=128, d=128, dtype="float32", group="one loss"),
        case("info_nce", R=1024, C=1024, d=128, dtype="bfloat16", group="one loss"),
        case("gather", B=128, C=128, H=16, n=8, dtype="bfloat16", group="one loss"),
        case("variance", G=8, B=128, d=128, dtype="bfloat16", group="one loss"),
    ]


def ours(case: Case) -> str:
    """The implementation that is measured beside eager."""
    return "native" if case.operator in NATIVE else "triton"


@dataclass(frozen=True)
class Options:
    """Measure the processor time of calls whose kernels compute nothing."""

    base: str | None = None
    """Another git revision to measure in the same run, alternating with this one."""
    turns: int = 40
    """Of each implementation, 20 calls each."""
    json: Path = RESULT
    """File of rows, written when all are measured."""


def serve() -> None:
    """Answer questions, JSON lines on standard input, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subjects: dict[tuple[int, str], Subject] = {}
    for line in sys.stdin:
        number, name = json.loads(line)
        if (number, name) not in subjects:
            subjects[number, name] = _subject(cases()[number], name)
            for _ in range(CALLS):
                subjects[number, name].call()
        subject = subjects[number, name]
        for _ in range(CALLS):  # the caches are the other processes'
            subject.call()
        begun = time.process_time()
        for _ in range(CALLS):
            subject.call()
        seconds = (time.process_time() - begun) / CALLS
        with recording.recorded() as entries:
            subject.call()
        print(json.dumps([seconds, len(recording.of(entries, "launch"))]), file=answers, flush=True)


def _subject(case: Case, name: str) -> Subject:
    function = next(one for one in implementations(case.operator) if one.name == name).build(case, "cuda")
    inputs = OPERATORS[case.operator].inputs(case.dims, case.torch_dtype, 0)
    return Subject(case, function, "cuda", [tuple(x.cuda().requires_grad_(x.is_floating_point()) for x in inputs)])


@contextlib.contextmanager
def _worker(folder: Path) -> Iterator[Any]:
    command = [sys.executable, "-c", START, str(folder), str(rows.ROOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(number: int, name: str) -> tuple[float, int]:
            print(json.dumps([number, name]), file=process.stdin, flush=True)
            line = process.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise RuntimeError(f"the process that measures {folder} ended; its message is above")
            seconds, launches = json.loads(line)
            return seconds, launches

        yield ask
        process.stdin.close()


@contextlib.contextmanager
def _checked_out(reference: str) -> Iterator[tuple[str, Path]]:
    commit = rows.git("rev-parse", "--short=12", f"{reference}^{{commit}}")
    if not commit:
        raise ValueError(f"git knows no revision {reference!r}")
    with tempfile.TemporaryDirectory(prefix="anomem-base-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=rows.ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        yield commit if commit.startswith(reference) else f"{reference} ({commit})", Path(folder)


def main(options: Options) -> int:
    """Measure, print and write."""
    with contextlib.ExitStack() as stack:
        folders = {rows.WORK: rows.ROOT}
        if options.base:
            revision, folder = stack.enter_context(_checked_out(options.base))
            folders[revision] = folder
        # A process for each, so that none is warm from another.
        workers = [
            (revision, stack.enter_context(_worker(folder)), eager)
            for revision, folder in folders.items()
            for eager in ((True, False) if revision == rows.WORK else (False,))
        ]
        measured = []
        for number, each in enumerate(cases()):
            subjects = [(revision, ask, "eager" if eager else ours(each)) for revision, ask, eager in workers]
            seconds: dict[tuple[str, str], list[float]] = {}
            launches: dict[tuple[str, str], int] = {}
            for _ in range(options.turns):
                for revision, ask, name in subjects:
                    taken, launches[revision, name] = ask(number, name)
                    seconds.setdefault((revision, name), []).append(taken)
            for (revision, name), times in seconds.items():
                row = rows.row_for(SUITE, each, name, revision, rows.MEASURED)
                low, high = statistics.quantiles(times, n=5)[::3]
                quantiles = {"p20": low, "p50": statistics.median(times), "p80": high}
                row.milliseconds = {key: value * 1e3 for key, value in quantiles.items()}
                row.repeats, row.launches, row.about = (
                    options.turns * CALLS,
                    launches[revision, name],
                    rows.about("cpu"),
                )
                measured.append(row)
                say(f"{each.title}, {name} at {revision}: {quantiles['p50'] * 1e6:.0f} µs, {row.launches} launches")
    rows.write(options.json, measured)
    return 0


if __name__ == "__main__":
    if not recording.present():
        start("-m", "benchmarks.host_time", *sys.argv[1:])
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.host_time")))
