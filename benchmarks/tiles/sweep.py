"""Every candidate tile of the kernels that a case launches, as rows; one with wrong numbers has no time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import rows
from benchmarks.harness.case import Case, case
from benchmarks.harness.measure import Ceilings
from benchmarks.harness.prepare import Subject, Truth, checked_at, reasons
from benchmarks.harness.rows import NoTime, Row, Wrong
from benchmarks.operators import OPERATORS
from benchmarks.rivals.ours import ours

SUITE = "tiles"
# Products of [rows, columns] scores with d features that a kernel does, and how many matrices [rows, d] it reads and
# writes; the columns are few or are the same rows.
WORK = {
    "retrieve_forward": (2, 2),
    "retrieve_resident": (2, 2),
    "retrieve_query_gradient": (3, 3),
    "retrieve_prototype_sums": (4, 2),
    "contrast_forward": (1, 1),
    "contrast_backward": (2, 2),
}


def cases() -> tuple[Case, ...]:
    """The sizes that matter, the first ones most: what is cut short by a time limit has answered something."""
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
    """Times tiles on one device.

    Args:
        device: "cpu" (the interpreter, for the tests) or "cuda".
        neighbours: whether to try the neighbours of the table's tiles too, most of which have to be compiled first.
        check: whether to hold each tile's numbers to float64.
    """

    def __init__(self, device: str, neighbours: bool = True, check: bool = True) -> None:
        self.device = device
        self.neighbours = neighbours
        self.check = check
        self.ceilings = Ceilings(device)
        # Not imported at the top: it loads Triton, which a machine without a GPU need not have.
        self.tuning: Any = importlib.import_module("anomem.kernels.tuning")

    def rows(self, one: Case) -> Iterator[Row]:
        """Measure a case.

        Yields:
            A row for each kernel that it launches and each candidate tile.
        """
        try:
            with reasons():
                searches = self._search(one)
                truth = Truth(checked_at(one, compiles=False), self.device) if self.check else None
        except NoTime as none:
            row = rows.row_for(SUITE, one, "triton", "work", none.status)
            row.reason, row.about = none.reason, rows.about(self.device)
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
        with self.tuning.using(self.tuning.Choice(None, search=True, neighbours=self.neighbours)) as choice:
            subject.call()
        return choice.searches

    def _row(self, one: Case, site: Any, trial: Any, truth: Truth | None) -> Row:
        kernel, kind, block_d = site.entry
        facts = " ".join(f"{name}={value}" for name, value in site.facts.items() if name != "dtype")
        shape = {"rows": site.rows, "columns": site.columns, "d": site.facts["d"]}
        tile = trial.tile
        name = f"{tile.rows}x{tile.columns}, {tile.warps} warps, {tile.stages} stages"
        row = Row(SUITE, kernel, shape, one.dtype, False, f"{kind} {block_d}, {facts}", name, "work", rows.MEASURED)
        row.tile = {**tile._asdict(), "registers": trial.registers}
        row.about = rows.about(self.device)
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
                self._hold(truth, kernel, tile)
                row.checked = truth.case.dims
        except Wrong as error:
            row.status, row.reason = error.status, error.reason
            return row
        row.milliseconds = dict(zip(("p20", "p50", "p80"), trial.milliseconds, strict=True))
        row.fraction_of_floor = row.floor_milliseconds / row.milliseconds["p50"]
        return row

    def _hold(self, truth: Truth, kernel: str, tile: Any) -> None:
        """Compute the smaller case of the check with this tile.

        Raises:
            Wrong: the numbers are not within the budget.
        """
        operator = truth.case.operator
        deterministic = torch.are_deterministic_algorithms_enabled()
        # Fills new memory with NaN: what no kernel has written must not look like what another tile has left there.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with self.tuning.using(Fixed(kernel, tile, self.tuning.fitting)):
                truth.check(ours("triton", "triton", operator, 0), OPERATORS[operator].ours("triton"))
        finally:
            torch.use_deterministic_algorithms(deterministic)


class Fixed:
    """A choice that gives one kernel this tile, and others the table's.

    Args:
        kernel: its name in the table.
        tile: its tile.
        fitting: the table's tiles that fit, of `anomem.kernels.tiles`.
    """

    def __init__(self, kernel: str, tile: Any, fitting: Any) -> None:
        self.kernel = kernel
        self.fixed = tile
        self.fitting = fitting

    def tile(self, site: Any, run: Any) -> Any:
        """The tile to launch with."""
        return self.fixed if site.entry[0] == self.kernel else self.fitting(site.entry, site.device)[0]
