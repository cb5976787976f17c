"""Report of `benchmarks.tune`: tables of rows, an order for `kernels/tile_table.py`, and answers to open questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import exp, log
from statistics import fmean
from typing import NamedTuple

from benchmarks.harness.console import say, table
from benchmarks.harness.rows import MEASURED, Row

TILES, SCHEMES = "tiles", "schemes"
"""The suites of `benchmarks.tune`."""
IN_A_GRAPH = ", in a CUDA graph"
MOST_TILES = 3
"""Of one entry of the tile table."""


class Ranked(NamedTuple):
    """A tile and how much slower than the fastest it is, as a geometric mean over the launches it was timed in."""

    tile: dict[str, int]
    ratio: float


def proposal(measured: Sequence[Row]) -> dict[str, list[Ranked]]:
    """The best tiles of each entry of the tile table, the best first.

    Only a tile with right numbers and a time in every launch of its entry is ranked: a tile that spills with separate
    values cannot be in the table.
    """
    launches: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in measured:
        if row.suite == TILES and row.tile is not None:
            entry = f"{row.operator} {row.group.partition(',')[0]}"
            launches[entry][f"{row.shape} {row.group}"][row.implementation] = row
    found: dict[str, list[Ranked]] = {}
    for entry, by_launch in launches.items():
        ratios: dict[str, list[float]] = defaultdict(list)
        tiles: dict[str, dict[str, int]] = {}
        for tried in by_launch.values():
            times = {name: row.milliseconds["p50"] for name, row in tried.items() if row.milliseconds}
            for name, time in times.items():
                ratios[name].append(log(time / min(times.values())))
                # Shared memory differs from launch to launch; the table holds an upper bound.
                tile = dict(tried[name].tile or {})
                tile["shared"] = max(tile["shared"], tiles.get(name, tile)["shared"])
                tiles[name] = tile
        ranked = [Ranked(tiles[name], exp(fmean(r))) for name, r in ratios.items() if len(r) == len(by_launch)]
        found[entry] = sorted(ranked, key=lambda one: one.ratio)[:MOST_TILES]
    return found


def show(measured: Sequence[Row]) -> None:
    """Print a table for each launch, the proposed order, and the answers."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in measured:
        sizes = " ".join(f"{name} {value}" for name, value in row.shape.items())
        groups[f"{row.operator} {row.group}: {sizes}"].append(row)
    for title, group in groups.items():
        lines = [_line(row) for row in sorted(group, key=_milliseconds) if row.milliseconds]
        if lines:
            table(title, ("what", "p50 ms", "p20", "p80", "of the floor", "registers", "shared KiB"), lines)
        for row in group:
            if not row.milliseconds:
                say(f"  {row.implementation}: {row.status}: {row.reason}")
    say("\nProposed for kernels/tile_table.py (behind a tile: its time over the fastest one's)")
    for entry, ranked in proposal(measured).items():
        say(f"  {entry}")
        for tile, ratio in ranked:
            fields = ", ".join(str(tile[name]) for name in ("rows", "columns", "warps", "stages", "shared"))
            say(f"    Tile({fields}),  # {ratio:.3f}")
    say("\nOpen questions")
    for answer in answers(measured):
        say(f"  {answer}")


def answers(measured: Sequence[Row]) -> Iterator[str]:
    """Answers to the questions that need a GPU, one sentence each."""
    forward = [
        row
        for row in measured
        if row.operator == "retrieve_flash_forward" and row.group.startswith("half 256") and row.milliseconds
    ]
    for shape in {str(row.shape): row.shape for row in forward}.values():
        best = {rows: _best([r for r in forward if r.shape == shape], f"{rows}x64,") for rows in (64, 128)}
        yield f"retrieval forward, d = 256, N = {shape['rows']}: " + _against("64x64", best[64], "128x64", best[128])
    pairs: dict[str, list[Row]] = defaultdict(list)
    sizes: dict[str, list[Row]] = defaultdict(list)
    for row in measured:
        if row.suite == SCHEMES:
            dims = row.shape
            title = f"retrieval {row.group}, d = {dims['d']}, M = {dims['M']}, N = {dims['N']}"
            (sizes if "MiB" in row.implementation else pairs)[title].append(row)
    for title, group in pairs.items():
        timed = sorted((row for row in group if row.milliseconds), key=_milliseconds)
        times = ", ".join(f"{row.implementation} {_milliseconds(row):.3g} ms" for row in timed)
        yield f"{title}: {times or 'no time'}"
    for title, group in sizes.items():
        for kind, of_kind in (
            ("from the host", [row for row in group if IN_A_GRAPH not in row.implementation]),
            ("in a CUDA graph", [row for row in group if IN_A_GRAPH in row.implementation]),
        ):
            timed = [row for row in of_kind if row.milliseconds]
            times = ", ".join(f"{r.implementation.removesuffix(IN_A_GRAPH)} {_milliseconds(r):.3g} ms" for r in timed)
            yield f"{title}, scratch, {kind}: {times or 'no time'}"
    yield "NT-Xent forward, full square against a triangle: there is no triangle to time"


def _against(name: str, row: Row | None, other_name: str, other: Row | None) -> str:
    times = [
        f"{n} {'no time' if r is None else f'{_milliseconds(r):.3g} ms'}" for n, r in ((name, row), (other_name, other))
    ]
    return ", ".join(times)


def _best(group: Sequence[Row], begin: str) -> Row | None:
    fitting = [row for row in group if row.implementation.startswith(begin)]
    return min(fitting, key=_milliseconds, default=None)


def _milliseconds(row: Row) -> float:
    return row.milliseconds["p50"] if row.milliseconds else float("inf")


def _line(row: Row) -> tuple[str, ...]:
    assert row.milliseconds is not None
    assert row.status == MEASURED
    tile = row.tile or {}
    return (
        row.implementation,
        *(f"{row.milliseconds[name]:.3g}" for name in ("p50", "p20", "p80")),
        f"{row.fraction_of_floor:.0%}",
        *(str(tile.get(name, "")) for name in ("registers", "shared")),
    )
