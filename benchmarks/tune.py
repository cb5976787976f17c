"""`python -m benchmarks.tune`: time every candidate tile of the Triton kernels, and their schemes, on this GPU.

Writes rows, prints a table for each launch, an order for `kernels/tile_table.py`, and answers to questions that need a
GPU (`benchmarks.tune_report`). A tile whose numbers are outside the tests' budget gets no time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from anomem.testing import draw
from benchmarks import tune_report
from benchmarks.harness import rows
from benchmarks.harness.case import Case, case
from benchmarks.harness.console import Bar, say
from benchmarks.harness.measure import Ceilings
from benchmarks.harness.prepare import Subject, Truth, checked_at, reasons
from benchmarks.harness.rows import RESULTS, NoTime, Row, Wrong, about, row_for
from benchmarks.operators import OPERATORS
from benchmarks.rivals.ours import ours
from benchmarks.tune_report import IN_A_GRAPH, SCHEMES, TILES

MIB = 2**20
SCRATCHES = tuple(MIB * size for size in (6, 12, 24, 48, 96, 192))
"""Sizes of the chunked scheme's scratch that are compared."""
LAYER = 1
"""The library's default normalisation, as the kernels number it."""
# Per kernel: products of [rows, columns] scores with d features, and matrices [rows, d] that it reads and writes. The
# columns are few or are the same rows.
WORK = {
    "retrieve_flash_forward": (2, 2),
    "retrieve_resident": (2, 2),
    "retrieve_flash_query_gradient": (3, 3),
    "retrieve_flash_prototype_sums": (4, 2),
    "retrieve_chunked_weights": (2, 2),
    "contrast_forward": (1, 1),
    "contrast_chunked_weights": (1, 2),
    "contrast_backward": (2, 2),
}

Time = Callable[[Callable[[], object]], tuple[float, ...]]
Part = tuple[Case, Callable[[Case], Iterator[Row]]]


@dataclass(frozen=True)
class Options:
    """What is timed."""

    filter: str = ""
    """Only cases whose line contains this."""
    json: str | None = None
    """File of rows, benchmarks/results/cuda-tiles.jsonl when not given; rows of an earlier run are replaced."""
    neighbours: bool = True
    """Try the neighbours of the table's tiles too: about five times as many, and each has to be compiled."""
    check: bool = True
    """Compare each tile's numbers with float64; a tile with wrong ones gets no time."""


def tile_cases() -> tuple[Case, ...]:
    """Cases of the tiles, the most important first, so that a run stopped by a time limit has answered something."""
    dtype = "bfloat16"
    return (
        *(case("retrieve", N=32768, M=512, d=d, dtype=dtype) for d in (256, 128, 64)),
        case("nt_xent", G=16, B=1024, d=128, dtype=dtype),
        case("nt_xent", G=16, B=1024, d=256, dtype=dtype),
        *(case("retrieve", N=8192, M=M, d=512, dtype=dtype, training=False) for M in (64, 128, 256)),
        case("info_nce", R=4096, C=4096, d=128, dtype=dtype),
        case("nt_xent", G=4, B=8192, d=256, dtype=dtype),
        case("nt_xent", G=8, B=1024, d=512, dtype=dtype),
        case("nt_xent", G=16, B=1024, d=64, dtype=dtype),
        case("nt_xent", G=16, B=1024, d=128, dtype="float32"),
    )


class Sweep:
    """Times every candidate tile of the kernels that a case launches, on one device.

    Args:
        device: "cpu" (the interpreter, for the tests) or "cuda".
        neighbours: whether to try the neighbours of the table's tiles too; most have to be compiled first.
        check: whether to compare each tile's numbers with float64.
    """

    def __init__(self, device: str, neighbours: bool = True, check: bool = True) -> None:
        self.device = device
        self.neighbours = neighbours
        self.check = check
        self.ceilings = Ceilings(device)
        # Not imported at the top: it loads Triton, which a machine without a GPU need not have.
        self.tile_search: Any = importlib.import_module("anomem.kernels.tile_search")

    def rows(self, one: Case) -> Iterator[Row]:
        """Measure a case.

        Yields:
            A row for each kernel that it launches and each candidate tile.
        """
        try:
            with reasons():
                searches = self._search(one)
                truth = Truth(checked_at(one, compiles=False), self.device) if self.check else None
        except NoTime as error:
            row = row_for(TILES, one, "triton", "work", error.status)
            row.reason, row.about = error.reason, about(self.device)
            yield row
            return
        for search in searches:
            for trial in search.trials:
                yield self._row(one, search.site, trial, truth)

    def _search(self, one: Case) -> list[Any]:
        operator = OPERATORS[one.operator]
        inputs = [x.to(self.device) for x in operator.inputs(one.dims, one.torch_dtype, 0)]
        for x in inputs:
            x.requires_grad_(one.training and x.is_floating_point())
        subject = Subject(one, operator.ours("triton"), self.device, [tuple(inputs)])
        with self.tile_search.using(self.tile_search.Choice(None, search=True, neighbours=self.neighbours)) as choice:
            subject.call()
        return choice.searches

    def _row(self, one: Case, site: Any, trial: Any, truth: Truth | None) -> Row:
        kernel, kind, block_d = site.entry
        facts = " ".join(f"{name}={value}" for name, value in site.facts.items() if name != "dtype")
        shape = {"rows": site.rows, "columns": site.columns, "d": site.facts["d"]}
        tile = trial.tile
        name = f"{tile.rows}x{tile.columns}, {tile.warps} warps, {tile.stages} stages"
        row = Row(TILES, kernel, shape, one.dtype, False, f"{kind} {block_d}, {facts}", name, "work", rows.MEASURED)
        row.tile = {**tile._asdict(), "registers": trial.registers}
        row.about = about(self.device)
        row.ceilings = self.ceilings.for_case(one)
        products, matrices = WORK[kernel]
        row.flops = 2.0 * products * site.rows * site.columns * site.facts["d"]
        row.bytes = float(matrices * site.rows * site.facts["d"] * one.torch_dtype.itemsize)
        row.exponentials = float(site.rows * site.columns)
        floor = max(row.flops / row.ceilings["product_flops"], row.bytes / row.ceilings["copy_bytes"])
        row.floor_milliseconds = 1e3 * floor
        if trial.milliseconds is None:
            row.status, row.reason = rows.FAILED, trial.reason
            return row
        try:
            if truth is not None:
                self._check(truth, kernel, tile)
                row.checked = truth.case.dims
        except Wrong as error:
            row.status, row.reason = error.status, error.reason
            return row
        row.milliseconds = dict(zip(("p20", "p50", "p80"), trial.milliseconds, strict=True))
        row.fraction_of_floor = row.floor_milliseconds / row.milliseconds["p50"]
        return row

    def _check(self, truth: Truth, kernel: str, tile: Any) -> None:
        """Compute the smaller case of the check with this tile.

        Raises:
            Wrong: the numbers are not within the budget.
        """
        operator = truth.case.operator
        deterministic = torch.are_deterministic_algorithms_enabled()
        # Fills new memory with NaN, so that unwritten memory cannot pass for the result of another tile.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with self.tile_search.using(self.tile_search.Fixed(kernel, tile)):
                truth.check(ours("triton", "triton", operator, 0), OPERATORS[operator].ours("triton"))
        finally:
            torch.use_deterministic_algorithms(deterministic)


def scheme_cases() -> tuple[Case, ...]:
    """Cases for which the choice of a scheme is uncertain."""
    dtype = "bfloat16"
    return (
        *(case("retrieve", N=32768, M=512, d=d, dtype=dtype) for d in (128, 64)),
        *(case("retrieve", N=32768, M=512, d=d, dtype=dtype, training=False) for d in (256, 128)),
        case("retrieve", N=32768, M=256, d=512, dtype=dtype, training=False),
    )


def scratch_cases() -> tuple[Case, ...]:
    """Cases for which the scratch matters; the backward pass uses the most."""
    return (
        case("retrieve", N=32768, M=512, d=512, dtype="bfloat16"),
        case("retrieve", N=32768, M=512, d=512, dtype="bfloat16", training=False),
    )


@dataclass(frozen=True)
class Pass:
    """One pass of retrieval, called below the operators, where the scheme can be chosen.

    A training case is the backward pass alone; the forward pass is another case.
    """

    case: Case
    device: str

    def schemes(self) -> dict[str, Callable[[], object]]:
        """The schemes that can run here, by name."""
        # Not imported at the top: they load Triton, which a machine without a GPU need not have.
        primitives, normalisation, retrieve, chunked, flash, resident = (
            importlib.import_module(f"anomem.kernels.{name}")
            for name in ("primitives", "rows", "retrieve", "retrieve_chunked", "retrieve_flash", "retrieve_resident")
        )
        query, keys, dout = self._tensors()
        memory = primitives.Memory(normalisation.normalized(keys, LAYER), None, None, query.shape[1] ** -0.5, LAYER)
        if self.case.training:
            out, _, normaliser = chunked.forward(query, memory)
            found = {"chunked": lambda: chunked.backward(dout, None, query, memory, out, normaliser)}
            entries = retrieve.flash_entries(
                ("retrieve_flash_query_gradient", "retrieve_flash_prototype_sums"), query, None
            )
            if entries is not None:
                found["flash"] = lambda: flash.backward(dout, None, query, memory, out, normaliser, entries)
            return found
        found = {"chunked": lambda: chunked.forward(query, memory)}
        entries = retrieve.flash_entries(("retrieve_flash_forward",), query, None)
        if entries is not None:
            found["flash"] = lambda: flash.forward(query, memory, entries[0])
        entry = retrieve.resident_entry(query, memory.keys)
        if entry is not None:
            found["resident"] = lambda: resident.forward(normalisation.normalized(query, LAYER), memory, entry)
        return found

    def _tensors(self) -> tuple[Tensor, ...]:
        """Queries [N, d], keys [M, d], and the gradient of what is read [N, d]."""
        N, M, d = (self.case.dims[name] for name in ("N", "M", "d"))
        return tuple(
            draw(count, d, dtype=self.case.torch_dtype, seed=seed).to(self.device)
            for seed, count in enumerate((N, M, N))
        )


class Schemes:
    """Times retrieval's schemes, and sizes of the chunked one's scratch, on one device.

    The library chooses these by rule: flash or chunks at d ≤ 256, the resident scores or chunks beyond, and
    `SCRATCH_BYTES`. A chunk is a dozen launches, so small chunks wait for the host. The same call replayed as a CUDA
    graph shows the time of the GPU alone.

    Args:
        device: "cpu" (the interpreter, for the tests) or "cuda".
        time: 20th, 50th and 80th percentile of a call in milliseconds.
        time_graph: the same of a call that is replayed as a CUDA graph.
    """

    def __init__(self, device: str, time: Time, time_graph: Time) -> None:
        self.device = device
        self.time = time
        self.time_graph = time_graph
        self.ceilings = Ceilings(device)

    def compare(self, one: Case) -> Iterator[Row]:
        """A row for each scheme of a case."""
        for name, call in Pass(one, self.device).schemes().items():
            yield self._row(one, name, call, self.time)

    def scratches(self, one: Case) -> Iterator[Row]:
        """Two rows for each size of the chunked scheme's scratch: launched by the host, and replayed as a graph."""
        primitives: Any = importlib.import_module("anomem.kernels.primitives")
        call = Pass(one, self.device).schemes()["chunked"]
        before = primitives.SCRATCH_BYTES
        try:
            for size in SCRATCHES:
                primitives.SCRATCH_BYTES = size
                yield self._row(one, f"{size // MIB} MiB", call, self.time)
                yield self._row(one, f"{size // MIB} MiB{IN_A_GRAPH}", call, self.time_graph)
        finally:
            primitives.SCRATCH_BYTES = before

    def _row(self, one: Case, name: str, call: Callable[[], object], time: Time) -> Row:
        row = row_for(SCHEMES, one, name, "work", rows.MEASURED)
        row.group = "backward" if one.training else "forward"
        row.about = about(self.device)
        row.ceilings = self.ceilings.for_case(one)
        both, forward = (OPERATORS[one.operator].work(one.dims, 2, training) for training in (True, False))
        row.flops = both.flops - forward.flops if one.training else forward.flops
        row.bytes = both.bytes - forward.bytes if one.training else forward.bytes
        floor = max(row.flops / row.ceilings["product_flops"], row.bytes / row.ceilings["copy_bytes"])
        row.floor_milliseconds = 1e3 * floor
        try:
            with reasons(), torch.no_grad():
                row.milliseconds = dict(zip(("p20", "p50", "p80"), time(call), strict=True))
            row.fraction_of_floor = row.floor_milliseconds / row.milliseconds["p50"]
        except NoTime as error:
            row.status, row.reason = error.status, error.reason
        return row


def main(options: Options) -> int:
    """Run. Returns 1 if a tile gave wrong numbers, 2 if nothing can be timed."""
    reason = obstacle()
    if reason is not None:
        say(reason)
        return 2
    state = about("cuda")
    say(f"{state['device_name']}, torch {state['torch']}, Triton {state['triton']}, commit {state['commit']}")
    path = Path(options.json) if options.json else RESULTS / "cuda-tiles.jsonl"
    parts = [part for part in plan("cuda", options) if options.filter in part[0].title]
    if not parts:
        say(f"--filter {options.filter!r} matches no case; the cases are:")
        for one, _ in plan("cuda", options):
            say(f"  {one.title}")
        return 2
    path.unlink(missing_ok=True)
    measured = list(run(parts, path))
    tune_report.show(measured)
    say(f"rows in {path}")
    return 1 if any(row.status == rows.WRONG for row in measured) else 0


def obstacle() -> str | None:
    """Why nothing can be timed here, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here: tiles are timed on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with the CUDA builds of torch)"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it"
    return None


def plan(device: str, options: Options) -> list[Part]:
    """Each case and the function that measures it, the quick ones first."""
    import triton.testing

    tiles = Sweep(device, options.neighbours, options.check)
    percentiles = {"quantiles": (0.2, 0.5, 0.8)}
    compared = Schemes(
        device, tiles.tile_search.measure, functools.partial(triton.testing.do_bench_cudagraph, rep=20, **percentiles)
    )
    return [
        *((one, compared.compare) for one in scheme_cases()),
        *((one, compared.scratches) for one in scratch_cases()),
        *((one, tiles.rows) for one in tile_cases()),
    ]


def run(parts: list[Part], path: Path) -> Iterator[Row]:
    """Measure, and store each row at once."""
    with Bar(len(parts)) as bar:
        for one, measure in parts:
            bar.note(one.title)
            for row in measure(one):
                rows.append(path, row)
                yield row
            bar.step()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.tune", description=__doc__)))
