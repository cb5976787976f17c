"""Retrieval's schemes against each other, and how large the scratch of the chunked one should be.

What the library takes by rule and not by a tile: flash or chunks at d ≤ 256, the resident scores or chunks beyond, and
`SCRATCH_BYTES`. A chunk is a dozen launches, so that small chunks wait for the host: the same calls replayed as a CUDA
graph show what the device alone needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anomem.testing import draw
from benchmarks.harness import rows
from benchmarks.harness.case import Case, case
from benchmarks.harness.measure import Ceilings
from benchmarks.harness.prepare import reasons
from benchmarks.harness.rows import NoTime, Row, row_for
from benchmarks.operators import OPERATORS

SUITE = "schemes"
MIB = 2**20
SCRATCHES = tuple(MIB * size for size in (6, 12, 24, 48, 96, 192))
IN_A_GRAPH = ", in a CUDA graph"
LAYER = 1
"""The library's default normalisation, as the kernels number it."""

Time = Callable[[Callable[[], object]], tuple[float, ...]]


def cases() -> tuple[Case, ...]:
    """Where a scheme is in doubt."""
    dtype = "bfloat16"
    return (
        *(case("retrieve", N=32768, M=512, d=d, dtype=dtype) for d in (128, 64)),
        *(case("retrieve", N=32768, M=512, d=d, dtype=dtype, training=False) for d in (256, 128)),
        case("retrieve", N=32768, M=256, d=512, dtype=dtype, training=False),
    )


def scratch_cases() -> tuple[Case, ...]:
    """Where the scratch matters; the backward pass keeps the most there."""
    return (
        case("retrieve", N=32768, M=512, d=512, dtype="bfloat16"),
        case("retrieve", N=32768, M=512, d=512, dtype="bfloat16", training=False),
    )


@dataclass(frozen=True)
class Pass:
    """One pass of retrieval, called below the operators, where the scheme can be chosen.

    A training case is its backward pass alone: the forward one is a case of its own.
    """

    case: Case
    device: str

    def schemes(self) -> dict[str, Callable[[], object]]:
        """The schemes that can run here, by name."""
        # Not imported at the top: they load Triton, which a machine without a GPU need not have.
        common, memories, normalisation, retrieve, chunked, flash, resident = (
            importlib.import_module(f"anomem.kernels.{name}")
            for name in (
                "common",
                "memory",
                "rows",
                "retrieve",
                "retrieve_chunked",
                "retrieve_flash",
                "retrieve_resident",
            )
        )
        query, keys, dout = self._tensors()
        precision = common.precision(query.dtype)
        memory = memories.Memory(normalisation.normalized(keys, LAYER), None, None, query.shape[1] ** -0.5, LAYER)
        if self.case.training:
            out, lse = chunked.forward(query, memory)
            found = {"chunked": lambda: chunked.backward(dout, None, query, memory)}
            entries = retrieve.flash_tiles(("retrieve_query_gradient", "retrieve_prototype_sums"), query, None)
            if entries is not None:
                found["flash"] = lambda: flash.backward(dout, None, query, memory, out, lse, entries, precision)
            return found
        found = {"chunked": lambda: chunked.forward(query, memory)}
        entries = retrieve.flash_tiles(("retrieve_forward",), query, None)
        if entries is not None:
            found["flash"] = lambda: flash.forward(query, memory, entries[0], precision)
        entry = retrieve.resident_tile(query, memory.keys)
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
    """Times schemes on one device.

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
        chunked: Any = importlib.import_module("anomem.kernels.retrieve_chunked")
        call = Pass(one, self.device).schemes()["chunked"]
        before = chunked.SCRATCH_BYTES
        try:
            for size in SCRATCHES:
                chunked.SCRATCH_BYTES = size
                yield self._row(one, f"{size // MIB} MiB", call, self.time)
                yield self._row(one, f"{size // MIB} MiB{IN_A_GRAPH}", call, self.time_graph)
        finally:
            chunked.SCRATCH_BYTES = before

    def _row(self, one: Case, name: str, call: Callable[[], object], time: Time) -> Row:
        row = row_for(SUITE, one, name, "work", rows.MEASURED)
        row.group = "backward" if one.training else "forward"
        row.about = rows.about(self.device)
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
        except NoTime as none:
            row.status, row.reason = none.status, none.reason
        return row
