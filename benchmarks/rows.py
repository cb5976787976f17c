"""Rows: one JSON object a line, so that a run can be stopped, taken up again and judged later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.case import Case

MEASURED = "measured"
UNAVAILABLE = "unavailable"
OUT_OF_MEMORY = "out of memory"
OVER_TIME = "over time"
WRONG = "wrong"
FAILED = "failed"
COUNTED = "counted"
"""Launches and memory without a time, of `benchmarks.counts`."""


@dataclass
class Row:
    """One implementation of one case."""

    suite: str
    operator: str
    shape: dict[str, int]
    dtype: str
    training: bool
    group: str
    implementation: str
    revision: str
    """"work" for the working tree, else the base revision that was measured beside it."""
    status: str
    reason: str | None = None
    """Why there is no time."""
    milliseconds: dict[str, float] | None = None
    """p20, p50, p80 of one call."""
    repeats: int = 0
    peak_bytes: int | None = None
    """Largest amount allocated during a call beyond what its inputs hold."""
    launches: int | None = None
    """Kernels and matrix products of one call, where they were counted."""
    compile_seconds: float | None = None
    """Of implementations that compile: what the first call took beyond a warm one, from an empty cache."""
    checked: dict[str, int] | None = None
    """The sizes at which the result was held to float64."""
    flops: float = 0.0
    bytes: float = 0.0
    exponentials: float = 0.0
    floor_milliseconds: float | None = None
    fraction_of_floor: float | None = None
    """Floor divided by the median; above 1 where caches beat the copy that the floor is made from."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """Measured in the same run: matrix product in flop/s, copy in byte/s."""
    others: float | None = None
    """Cores that other processes kept busy while the case was timed; from a tenth on the times are theirs too."""
    tile: dict[str, int] | None = None
    """Of a single kernel: rows, columns, warps, stages, shared memory in KiB, registers."""
    about: dict[str, Any] = field(default_factory=dict)
    """Code, libraries, device; see `benchmarks.machine`."""

    @property
    def key(self) -> str:
        """Equal for rows that measure the same thing at the same state of the code, on the same kind of machine."""
        state = [self.about.get(name) for name in ("commit", "dirty", "torch", "device", "device_name", "threads")]
        what = [self.operator, self.shape, self.dtype, self.training, self.group, self.implementation, self.revision]
        return json.dumps([self.suite, *what, *state])


def row_for(suite: str, case: Case, implementation: str, revision: str, status: str) -> Row:
    """A row with the fields of its case."""
    return Row(suite, case.operator, case.dims, case.dtype, case.training, case.group, implementation, revision, status)


def append(path: Path, row: Row) -> None:
    """Add a row to a file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def write(path: Path, rows: list[Row]) -> None:
    """A file of just these rows."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """The rows of a file; of rows with the same key, the last."""
    if not path.exists():
        return []
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({row.key: row for row in rows}.values())
