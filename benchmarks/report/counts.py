"""Launches, memory and host time without a GPU: tables, and a picture of memory against size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from anomem.plots.style import ORANGE
from benchmarks.counts import GPU_BYTES, SUITE
from benchmarks.harness import rows
from benchmarks.harness.rows import Row
from benchmarks.host_time import RESULT as HOST_RESULT
from benchmarks.report.pictures import (
    BLACK,
    GREY,
    STYLES,
    SWEPT,
    count_label,
    figure_of,
    legend_below,
    plain_numbers,
    save,
)  # fmt: skip
from benchmarks.report.tables import OURS, cases_of, commits, label, load, picture, size

SHOWN = ("eager", "torch.compile")


def section(results: Path) -> str:
    """The picture, and one line a case: kernels launched and memory of one call."""
    counted = load(results, "cuda", SUITE)
    if not counted:
        return "Not counted yet."
    about = counted[0].about
    memory = picture("Memory of NT-Xent and of retrieval on a GPU against size", "cuda-memory")
    lines = [
        *([memory, ""] if any(row.group.startswith("over ") for row in counted) else []),
        f"torch {about['torch']}, Triton {about['triton']}. {commits(row.about for row in counted)}",
        "",
        "| operator and size | eager | torch.compile | leanest other | anomem (triton) | anomem (native) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(line_of, cases_of(counted))])


def line_of(case: list[Row]) -> str:
    """The table's line of one case."""
    by_name = {row.implementation: row for row in case}
    others = [row for row in case if row.status == rows.COUNTED and row.implementation not in (*SHOWN, *OURS)]
    other = min(others, key=lambda row: row.peak_bytes or 0, default=None)
    cells = [cell(by_name.get(name)) for name in SHOWN]
    cells += [f"{cell(other)} ({other.implementation})" if other else "–"]
    cells += [cell(by_name.get(name)) for name in ("triton", "native")]
    return f"| {' | '.join([label(case[0]), *cells])} |"


def cell(row: Row | None) -> str:
    """Kernels and memory, or the status of a row without them."""
    if row is None or row.status in (rows.UNAVAILABLE, rows.FAILED):
        return "–"
    if row.status != rows.COUNTED:
        return row.status
    return f"{row.launches} kernels, {size(row.peak_bytes)}"


def draw(results: Path, folder: Path) -> Path | None:
    """Memory of the sweeps against size, a panel each; None if there are no rows."""
    sweeps = [row for row in load(results, "cuda", SUITE) if row.group.startswith("over ")]
    if not sweeps:
        return None
    names = list(dict.fromkeys((row.operator, row.group) for row in sweeps))
    figure, axes = figure_of(1, len(names), 5.6 * len(names), 5.2)
    for plot, name in zip(axes[0], names, strict=True):
        panel(plot, [row for row in sweeps if (row.operator, row.group) == name])
    axes[0][0].set_ylabel("peak memory of forward + backward, GiB")
    legend_below(figure, axes[0], 5, fontsize=8)
    figure.suptitle("Memory on a GPU, counted without one: a red cross where the next size does not fit", fontsize=11)
    path = folder / "cuda-memory.png"
    save(figure, path)
    return path


def panel(plot: Any, sweep: list[Row]) -> None:
    """One line for each implementation of a sweep."""
    axis = sweep[0].group.removeprefix("over ")
    for name in dict.fromkeys(row.implementation for row in sweep):
        line = sorted((row for row in sweep if row.implementation == name), key=lambda row: row.shape[axis])
        done = [row for row in line if row.peak_bytes is not None]
        if not done:
            continue
        colour, marker = STYLES.get(name, (GREY, "."))
        sizes, memory = [row.shape[axis] for row in done], [(row.peak_bytes or 0) / 2**30 for row in done]
        label, width = (f"anomem ({name})", 2.2) if name in OURS else (name, 1.1)
        plot.plot(sizes, memory, color=colour, marker=marker, markersize=5, linewidth=width, label=label)
        beyond = [row for row in line if row.shape[axis] > sizes[-1]]
        if beyond and beyond[0].status == rows.OUT_OF_MEMORY:
            plot.plot(sizes[-1:], memory[-1:], "x", color=ORANGE, markersize=11, markeredgewidth=2, zorder=3)
    plot.axhline(GPU_BYTES / 2**30, color=BLACK, linestyle=":", linewidth=1)
    plot.set_xscale("log", base=2)
    plot.set_yscale("log")
    plot.grid(True, which="major", alpha=0.3)
    plot.xaxis.set_major_formatter(lambda x, _: count_label(x))
    plain_numbers(plot.yaxis)
    plot.set_xlabel(SWEPT[axis])
    fixed = [f"{name} = {value}" for name, value in sweep[0].shape.items() if name not in (axis, "B")]
    plot.set_title(f"{sweep[0].operator}, {', '.join(fixed)}, {sweep[0].dtype} (dotted: 80 GiB)", fontsize=10)


def host_section(results: Path) -> str:
    """Processor time of small calls whose kernels compute nothing, of both revisions of one run."""
    measured = rows.read(results / HOST_RESULT.name)
    if not measured:
        return "Not measured yet."
    about = measured[0].about
    lines = [
        f"{about['device_name']}, torch {about['torch']}, Triton {about['triton']}, one thread. "
        f"{commits(row.about for row in measured)}",
        "",
        "| operator and size | implementation | kernels | µs a call, p20 to p80 | against eager |",
        "|---|---|--:|--:|--:|",
    ]
    eager = {label(row): row.milliseconds for row in measured if row.implementation == "eager"}
    for row in measured:
        times, other = row.milliseconds, eager[label(row)]
        assert times is not None
        assert other is not None
        name = row.implementation if row.revision == rows.WORK else f"{row.implementation} at {row.revision}"
        span = f"{times['p50'] * 1e3:.0f} ({times['p20'] * 1e3:.0f} to {times['p80'] * 1e3:.0f})"
        lines.append(f"| {label(row)} | {name} | {row.launches} | {span} | {other['p50'] / times['p50']:.2f}× |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Path], str]] = {"cuda-counts": section, "cuda-host": host_section}
