"""Pictures from rows: time and memory against size, distance to the ceilings, bars of a training step.

Colours are those of `anomem.plots`, safe for colour blindness; every line also has its own marker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anomem.plots.style import AMBER, BLUE, GREEN, ORANGE, PURPLE, SKY
from benchmarks.harness import rows
from benchmarks.harness.rows import MEASURED, OUT_OF_MEMORY, Row, Step
from benchmarks.report.tables import OURS, load

YELLOW, BLACK, GREY = "#F0E442", "#000000", "#7F7F7F"
# A name keeps its colour and marker in every picture.
STYLES: dict[str, tuple[str, str]] = {
    "native": (BLUE, "o"),
    "triton": (BLUE, "D"),
    "eager": (BLACK, "s"),
    "torch.compile": (AMBER, "^"),
    "SDPA flash folded": (GREEN, "v"),
    "SDPA flash expanded": (GREEN, "<"),
    "SDPA math folded": (SKY, ">"),
    "SDPA math expanded": (SKY, "P"),
    "SDPA efficient folded": (YELLOW, "v"),
    "SDPA cudnn folded": (YELLOW, "^"),
    "FlexAttention": (ORANGE, "X"),
    "hopfield-layers (formula)": (PURPLE, "p"),
    "Python chunks": (GREY, "h"),
    "eager baddbmm": (SKY, "<"),
    "pytorch-metric-learning": (ORANGE, "v"),
    "lightly": (PURPLE, "d"),
    "lightly (formula)": (PURPLE, "d"),
}
SWEPT = {"N": "queries N", "M": "prototypes M", "d": "features d", "G": "groups G", "B": "images B"}
NO_MEMORY = "the next size: OOM"
PHASE_COLOURS = (GREY, YELLOW, SKY, GREEN, BLUE, AMBER, PURPLE, ORANGE)


def draw_all(results: Path, folder: Path) -> list[Path]:
    """Every picture for which there are rows.

    Args:
        results: folder of rows.
        folder: of the pictures.

    Returns:
        The files that were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device in ("cpu", "cuda"):
        scaling = load(results, device, "scaling")
        for operator in dict.fromkeys(row.operator for row in scaling):
            path = folder / f"{device}-scaling-{operator}.png"
            sweeps([row for row in scaling if row.operator == operator], path)
            written.append(path)
        kernels = load(results, device, "kernels")
        if any(row.implementation in OURS and row.status == MEASURED for row in kernels):
            roofline(kernels, folder / f"{device}-roofline.png")
            written.append(folder / f"{device}-roofline.png")
        steps = rows.read(results / f"{device}-steps.jsonl", Step)
        if steps:
            bars(steps, folder / f"{device}-training.png")
            written.append(folder / f"{device}-training.png")
    return written


def sweeps(measured: list[Row], path: Path) -> None:
    """Time above, peak memory below, one column for each size that is swept.

    Args:
        measured: rows of one operator.
        path: of the picture.
    """
    groups = list(dict.fromkeys(row.group for row in measured))
    figure, axes = figure_of(2, len(groups), 4.6 * len(groups), 7.2, sharex="col")
    for column, group in enumerate(groups):
        axis_name = group.removeprefix("over ")
        swept = [row for row in measured if row.group == group]
        time, memory = axes[0][column], axes[1][column]
        for name in dict.fromkeys(row.implementation for row in swept):
            line = sorted((r for r in swept if r.implementation == name), key=lambda r: r.shape[axis_name])
            done = [row for row in line if row.milliseconds]
            if done:
                _sweep_line(time, memory, axis_name, name, line, done)
        reached = max((row.shape[axis_name] for row in swept if row.milliseconds), default=0)
        floor = {row.shape[axis_name]: row.floor_milliseconds for row in swept if row.shape[axis_name] <= reached}
        time.plot(sorted(floor), [floor[x] for x in sorted(floor)], ":", color=GREY, label="floor")
        fixed = {
            k: v
            for k, v in swept[0].shape.items()
            if k != axis_name and not (k == "B" and axis_name != "B" and "N" in swept[0].shape)
        }
        time.set_title(", ".join(f"{k} = {v}" for k, v in fixed.items()), fontsize=10)
        for plot, label in ((time, "forward + backward, ms"), (memory, "peak memory, MiB")):
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            plot.grid(True, which="major", alpha=0.3)
            plot.set_ylabel(label if column == 0 else "")
            plot.xaxis.set_major_formatter(lambda x, _: count_label(x))
            plain_numbers(plot.yaxis)
            plot.tick_params(labelbottom=True)
        memory.set_xlabel(SWEPT[axis_name])
    legend_below(figure, axes[0], 5, fontsize=9)
    about = measured[0].about
    figure.suptitle(
        f"{measured[0].operator}, {measured[0].dtype} — {about['device_name']}, {about['threads']} threads\n"
        "a line ends where memory or the bound on a call's time ends it",
        fontsize=11,
    )
    save(figure, path)


def _sweep_line(time: Any, memory: Any, axis: str, name: str, line: list[Row], done: list[Row]) -> None:
    colour, marker = STYLES.get(name, (GREY, "."))
    style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2.2 if name in OURS else 1.1}
    sizes = [row.shape[axis] for row in done]
    medians = [row.milliseconds["p50"] for row in done if row.milliseconds]
    time.plot(sizes, medians, label=f"anomem ({name})" if name in OURS else name, **style)
    memory.plot(sizes, [max(row.peak_bytes or 0, 1) / 2**20 for row in done], **style)
    beyond = [row for row in line if row.shape[axis] > sizes[-1]]
    if beyond and beyond[0].status == OUT_OF_MEMORY:
        time.plot(
            sizes[-1:], medians[-1:], "x", color=ORANGE, markersize=11, markeredgewidth=2, zorder=3, label=NO_MEMORY
        )


def roofline(measured: list[Row], path: Path) -> None:
    """Rate of the library and of eager against intensity, under the two measured ceilings.

    Args:
        measured: rows of the kernel suite.
        path: of the picture.
    """
    figure, axes = figure_of(1, 1, 8.0, 5.4)
    plot = axes[0][0]
    ceilings = measured[0].ceilings
    peak, copy = ceilings["product_flops"] / 1e9, ceilings["copy_bytes"] / 1e9
    dtype = measured[0].dtype
    shown = [row for row in measured if row.milliseconds and row.flops and row.dtype == dtype]
    intensities = [row.flops / row.bytes for row in shown]
    low, high = min([*intensities, peak / copy]) / 2, max([*intensities, peak / copy]) * 2
    line = [low, peak / copy, high]
    plot.plot(line, [min(peak, copy * x) for x in line], "-", color=BLACK, linewidth=1.5)
    plot.annotate(
        f"matrix product {peak:.0f} Gflop/s", (high, peak), xytext=(-4, 5), textcoords="offset points", ha="right"
    )
    plot.annotate(f"copy {copy:.1f} GB/s", (low, copy * low), xytext=(8, -2), textcoords="offset points", va="top")
    operators = dict.fromkeys(row.operator for row in shown)
    for operator, colour in zip(operators, (BLUE, AMBER, GREEN, PURPLE, ORANGE, SKY), strict=False):
        for name, marker, filled in (*((name, "o", True) for name in OURS), ("eager", "s", False)):
            points = [row for row in shown if row.operator == operator and row.implementation == name]
            if points:
                plot.scatter(
                    [row.flops / row.bytes for row in points],
                    [row.flops / row.milliseconds["p50"] / 1e6 for row in points if row.milliseconds],
                    s=38,
                    marker=marker,
                    color=colour if filled else "none",
                    edgecolors=colour,
                    label=f"{operator}, {f'anomem ({name})' if name in OURS else name}",
                )
    plot.set_xscale("log")
    plot.set_yscale("log")
    for axis in (plot.xaxis, plot.yaxis):
        plain_numbers(axis)
    plot.set_ylim(top=1.7 * peak)
    plot.set_xlabel("least flops / least bytes of the operator, flop/byte")
    plot.set_ylabel("least flops / measured time, Gflop/s")
    plot.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    about = measured[0].about
    figure.suptitle(f"{dtype} — {about['device_name']}, {about['threads']} threads")
    save(figure, path)


def bars(steps: list[Step], path: Path) -> None:
    """A stacked bar for each pipeline.

    Args:
        steps: rows of `benchmarks.profile_training`.
        path: of the picture.
    """
    figure, axes = figure_of(1, 1, 9.0, 1.6 + 0.8 * len(steps))
    plot = axes[0][0]
    phases = list(dict.fromkeys(phase for row in steps for phase in row.milliseconds))
    names = [row.pipeline for row in steps]
    left = [0.0] * len(steps)
    for phase, colour in zip(phases, PHASE_COLOURS, strict=False):
        widths = [row.milliseconds.get(phase, 0.0) for row in steps]
        plot.barh(names, widths, left=left, color=colour, edgecolor="white", linewidth=0.5, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    whole = [1e3 * row.seconds_per_step for row in steps]
    plot.scatter(whole, names, marker="|", s=900, color=BLACK, linewidth=2, zorder=3, label="step, phases not timed")
    for i, row in enumerate(steps):
        end = max(left[i], whole[i])
        plot.annotate(f"  {row.images_per_second:.0f} images/s", (end, i), va="center", fontsize=9)
    plot.set_xlim(0, max(*left, *whole) * 1.2)
    plot.invert_yaxis()
    plot.set_xlabel("ms per step")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9, markerscale=0.4)
    about = steps[0].about
    figure.suptitle(f"{steps[0].title} — {about['device_name']}, {about['threads']} threads", fontsize=11)
    save(figure, path)


def plain_numbers(axis: Any) -> None:
    """500 and not 5 × 10²; within two decades also a label at 2 and 5."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def count_label(value: float) -> str:
    """2048 -> "2k"."""
    for unit, scale in (("M", 2**20), ("k", 2**10)):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def figure_of(lines: int, columns: int, width: float, height: float, sharex: Any = False) -> Any:
    """A figure and its axes [lines][columns], drawn without a screen.

    Args:
        lines: of axes.
        columns: of axes.
        width: of the figure in inches.
        height: of the figure in inches.
        sharex: as in `matplotlib.pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(lines, columns, figsize=(width, height), squeeze=False, sharex=sharex, layout="constrained")


def legend_below(figure: Any, plots: Any, columns: int, **style: Any) -> None:
    """One legend below the figure for several plots.

    Args:
        figure: from `figure_of`.
        plots: whose lines it names; of equal labels the last counts.
        columns: of the legend.
        style: as in `matplotlib.figure.Figure.legend`.
    """
    handles = {label: handle for plot in plots for handle, label in zip(*plot.get_legend_handles_labels(), strict=True)}
    labels = handles.keys()
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns, frameon=False, **style)


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it.

    Args:
        figure: from `figure_of`.
        path: of the picture.
    """
    import matplotlib.pyplot as plt

    # Without the date and version a picture of the same rows is the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
