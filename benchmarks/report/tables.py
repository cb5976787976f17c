"""Tables in Markdown. Every figure is a row's, or a quotient of two rows of the same run.

Links to pictures are relative to `docs/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.harness import rows
from benchmarks.harness.case import Case
from benchmarks.harness.rows import Row, Step

OURS = ("native", "triton")
NO_TIME = (rows.OUT_OF_MEMORY, rows.OVER_TIME, rows.WRONG, rows.FAILED)
"""Statuses of what was tried and has no time."""
PROCESSORS = {"cpu": "AMD family 26", "cpu-zen4": "AMD family 25", "cpu-amx": "Intel family 6, AMX"}
"""By what files of rows are called."""
NOT_MEASURED = {**dict.fromkeys(PROCESSORS, "Not measured yet."), "cuda": "Not measured on a GPU yet."}


def load(results: Path, device: str, suite: str) -> list[Row]:
    """Rows of the working tree's revision; for a case and an implementation the last row counts."""
    found = [row for row in rows.read(results / f"{device}-{suite}.jsonl") if row.revision == rows.WORK]
    return list({(row.case, row.implementation): row for row in found}.values())


def cases_of(measured: Iterable[Row]) -> list[list[Row]]:
    """Rows grouped by case, in the order in which they were measured."""
    groups: dict[Case, list[Row]] = {}
    for row in measured:
        groups.setdefault(row.case, []).append(row)
    return list(groups.values())


def fastest(group: Iterable[Row], names: tuple[str, ...] = OURS) -> Row | None:
    """The fastest of these implementations of a case, by default of the library's own."""
    return min((row for row in group if row.milliseconds and row.implementation in names), key=median, default=None)


def fastest_other(group: Iterable[Row], *but: str) -> Row | None:
    """The fastest implementation of a case that is neither the library's nor one of these."""
    others = (row for row in group if row.milliseconds and row.implementation not in (*OURS, *but))
    return min(others, key=median, default=None)


def summary(device: str) -> Callable[[Path], str]:
    """One line a case: eager, the best rival, the library."""

    def section(results: Path) -> str:
        measured = [*load(results, device, "kernels"), *load(results, device, "training")]
        if not measured:
            return NOT_MEASURED[device]
        lines = [
            "| operator and size | eager ms | best other ms | anomem ms | against eager | against best other | "
            "peak memory, eager → anomem | of the floor |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [line for group in cases_of(measured) if (line := summary_line(group))]
        return "\n".join([provenance(measured), "", *lines])

    return section


def summary_line(group: list[Row]) -> str | None:
    """The summary's line of one case; None if the library was not measured."""
    by_name = {row.implementation: row for row in group if row.status == rows.MEASURED}
    eager = by_name.get("eager")
    own = fastest(by_name.values())
    if eager is None or own is None:
        return None
    other = fastest_other(group, "eager")
    cells = [
        f"{label(own)}",
        number(median(eager)),
        f"{number(median(other))} ({other.implementation})" if other else "–",
        f"{number(median(own))} ({own.implementation})",
        times(median(eager) / median(own)),
        times(median(other) / median(own)) if other else "–",
        f"{size(eager.peak_bytes)} → {size(own.peak_bytes)}",
        f"{own.fraction_of_floor:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def details(device: str, suite: str) -> Callable[[Path], str]:
    """Every implementation of every case; those without a time with the reason."""

    def section(results: Path) -> str:
        measured = load(results, device, suite)
        if not measured:
            return NOT_MEASURED[device]
        lines = [
            "| case | implementation | p50 ms | p20 – p80 | peak memory | of the floor |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for group in cases_of(measured):
            timed = sorted((row for row in group if row.milliseconds), key=median)
            for i, row in enumerate(timed):
                assert row.milliseconds is not None
                spread = f"{number(row.milliseconds['p20'])} – {number(row.milliseconds['p80'])}"
                head = label(row) if i == 0 else ""
                compiled = f", compiled in {number(row.compile_seconds)} s" if row.compile_seconds else ""
                cells = [head, row.implementation + compiled, number(median(row)), spread, size(row.peak_bytes)]
                lines.append(f"| {' | '.join(cells)} | {row.fraction_of_floor:.0%} |")
            lines += [
                f"| | {row.implementation} | {row.status} | {escape(row.reason)} | | |"
                for row in group
                if row.status in NO_TIME
            ]
        text = [provenance(measured), "", *lines, "", *absent(measured)]
        if suite == "kernels":
            title = "What the library and eager PyTorch reach under the two measured ceilings"
            text = [picture(title, f"{device}-roofline"), "", *text]
        return "\n".join(text)

    return section


def absent(measured: list[Row]) -> list[str]:
    """One line for each reason why an implementation is missing everywhere."""
    reasons: dict[str, set[str]] = {}
    for row in measured:
        if row.status == rows.UNAVAILABLE:
            reasons.setdefault(str(row.reason), set()).add(row.implementation)
    return [f"- {', '.join(sorted(names))}: {reason}." for reason, names in sorted(reasons.items())]


def limits(device: str) -> Callable[[Path], str]:
    """The size at which each implementation of the sweeps stops, and why."""

    def section(results: Path) -> str:
        measured = load(results, device, "scaling")
        if not measured:
            return NOT_MEASURED[device]
        lines = ["| operator and sweep | implementation | largest size measured | first size not measured |"]
        lines.append("|---|---|---|---|")
        sweeps = dict.fromkeys((row.operator, row.group, row.implementation) for row in measured)
        for operator, group, name in sweeps:
            line = [row for row in measured if (row.operator, row.group, row.implementation) == (operator, group, name)]
            stopped = [row for row in line if row.status in (rows.OUT_OF_MEMORY, rows.OVER_TIME)]
            done = [row for row in line if row.status == rows.MEASURED]
            if stopped and done:
                axis = group.removeprefix("over ")
                largest = max(done, key=lambda row: row.shape[axis])
                first = min(stopped, key=lambda row: row.shape[axis])
                lines.append(
                    f"| {operator} {group} | {name} | {axis} = {largest.shape[axis]} in {number(median(largest))} ms "
                    f"| {axis} = {first.shape[axis]}: {escape(first.reason)} |"
                )
        pictures: list[str] = []
        for operator in dict.fromkeys(row.operator for row in measured):
            pictures += [picture(f"Time and memory of {operator} against size", f"{device}-scaling-{operator}"), ""]
        return "\n".join([*pictures, "Where each implementation stops:", "", provenance(measured), "", *lines])

    return section


def grid(device: str) -> Callable[[Path], str]:
    """One line a case of the grid: the library against eager, `torch.compile` and the best of all others."""

    def section(results: Path) -> str:
        measured = load(results, device, "grid")
        if not measured:
            return NOT_MEASURED[device]
        reasons = [
            f"- {label(row)}, {row.implementation}: {row.status}, {row.reason}."
            for row in measured
            if row.status in NO_TIME
        ]
        lines = [
            "| operator and size | eager ms | torch.compile ms | best other ms | anomem ms | against eager | "
            "against torch.compile | against best other | peak memory, eager → anomem |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for group in cases_of(measured):
            by_name = {row.implementation: row for row in group if row.status == rows.MEASURED}
            own = fastest(by_name.values())
            rivals = [
                by_name.get("eager"),
                by_name.get("torch.compile"),
                fastest_other(group, "eager", "torch.compile"),
            ]
            times_of = [number(median(rival)) if rival else "–" for rival in rivals]
            if compiled := rivals[1]:
                times_of[1] += f" (compiled in {number(compiled.compile_seconds or 0)} s)"
            if other := rivals[2]:
                times_of[2] += f" ({other.implementation})"
            against = [times(median(rival) / median(own)) if rival and own else "–" for rival in rivals]
            memory = f"{size(rivals[0].peak_bytes if rivals[0] else None)} → {size(own.peak_bytes if own else None)}"
            best = f"{number(median(own))} ({own.implementation})" if own else "–"
            lines.append(f"| {' | '.join([label(group[0]), *times_of, best, *against, memory])} |")
        return "\n".join([provenance(measured), "", *lines, *(["", *reasons] if reasons else [])])

    return section


def losses(device: str) -> Callable[[Path], str]:
    """The cases in which a rival is fastest."""

    def section(results: Path) -> str:
        suites = ("kernels", "grid", "training", "small")
        measured = [row for suite in suites for row in load(results, device, suite)]
        lines = ["| operator and size | fastest | ms | anomem ms | anomem / fastest |", "|---|---|--:|--:|--:|"]
        head = len(lines)
        for group in cases_of(measured):
            timed = [row for row in group if row.milliseconds]
            own = fastest(timed)
            best = min(timed, key=median, default=None)
            if own is not None and best is not None and best is not own:
                cells = [label(best), best.implementation, number(median(best)), number(median(own))]
                lines.append(f"| {' | '.join(cells)} | {times(median(own) / median(best))} |")
        if not any(row.milliseconds and row.implementation in OURS for row in measured):
            return "No implementation of this library was measured yet."
        return "\n".join(lines) if len(lines) > head else "None."

    return section


def crossovers(device: str) -> Callable[[Path], str]:
    """The two sizes of a sweep between which the library and the fastest other implementation change places."""

    def section(results: Path) -> str:
        measured = load(results, device, "scaling")
        lines = []
        for operator, group in dict.fromkeys((row.operator, row.group) for row in measured):
            axis = group.removeprefix("over ")
            series = []
            for case in cases_of(row for row in measured if (row.operator, row.group) == (operator, group)):
                own, other = fastest(case), fastest_other(case)
                if own is not None and other is not None:
                    series.append((own.shape[axis], median(other) / median(own), other.implementation))
            if not series:
                continue
            series.sort()
            steps = [f"{axis} = {size}: {times(ratio)} ({name})" for size, ratio, name in series]
            changes = [
                f"{before[0]} and {after[0]}"
                for before, after in itertools.pairwise(series)
                if (before[1] > 1) != (after[1] > 1)
            ]
            order = f"changes between {axis} = {'; '.join(changes)}" if changes else "does not change"
            lines.append(f"- `{operator}` {group}: {order}. Best other / anomem: {', '.join(steps)}.")
        return "\n".join(lines) or NOT_MEASURED[device]

    return section


def training_steps(device: str) -> Callable[[Path], str]:
    """Phases of a step of the training loop."""

    def section(results: Path) -> str:
        measured = rows.read(results / f"{device}-steps.jsonl", Step)
        if not measured:
            return NOT_MEASURED[device]
        phases = list(dict.fromkeys(phase for row in measured for phase in row.milliseconds))
        lines = [
            f"| ms of a step | {' | '.join(phases)} | sum | without phases | images/s | peak memory |",
            f"|---|{'--:|' * (len(phases) + 4)}",
        ]
        for row in measured:
            cells = [number(row.milliseconds[phase]) if phase in row.milliseconds else "–" for phase in phases]
            cells += [number(sum(row.milliseconds.values())), number(1e3 * row.seconds_per_step)]
            cells += [f"{row.images_per_second:.0f}", size(row.peak_bytes)]
            lines.append(f"| {row.pipeline} | {' | '.join(cells)} |")
        about = measured[0].about
        head = f"{measured[0].title}. {machine_line(about)} {commits(row.about for row in measured)}"
        return "\n".join([head, "", *lines, "", picture("A training step by phase", f"{device}-training")])

    return section


def execution(device: str) -> Callable[[Path], str]:
    """Processor time of a step as the library executes it, beside plain float32 and the usual pipeline."""

    def section(results: Path) -> str:
        measured = [row for row in rows.read(results / f"{device}-execution.jsonl", Step) if row.cpu_seconds_per_step]
        if not measured:
            return NOT_MEASURED[device]
        columns = [*EXECUTIONS.values(), "anomem's augmentation", "anomem's products at the ceiling"]
        lines = [f"| processor time of a step, ms | {' | '.join(columns)} |"]
        lines.append("|---|" + "--:|" * len(columns))
        for title in dict.fromkeys(row.title for row in measured):
            found = {row.pipeline.split(" ")[0]: row for row in measured if row.title == title}
            ours = found["anomem"].cpu_seconds_per_step or 0.0
            cells = []
            for name in EXECUTIONS:
                seconds = found[name].cpu_seconds_per_step or 0.0 if name in found else None
                ratio = "" if name == "anomem" or seconds is None else f" ({seconds / ours:.2f}×)"
                cells.append("–" if seconds is None else f"{number(1e3 * seconds)}{ratio}")
            phases, products = found["anomem"].milliseconds, found["anomem"].product_seconds
            cells.append(f"{phases['augment'] / sum(phases.values()):.1%}" if "augment" in phases else "–")
            cells.append("–" if products is None else f"{number(1e3 * products)} ({products / ours:.0%})")
            executed = found["anomem"].config
            how = f"{executed['precision']}, {executed['memory_format']}"
            lines.append(f"| {title.removeprefix('Stage 1, ')}; anomem: {how} | {' | '.join(cells)} |")
        head = f"{machine_line(measured[0].about)} {commits(row.about for row in measured)}"
        return "\n".join([head, "", *lines])

    return section


EXECUTIONS = {"eager": "eager float32", "anomem": "anomem", "compiled": "anomem compiled", "usual": "usual pipeline"}


def batches(results: Path) -> str:
    """Peak memory of a step over batches, at once and by gradient caching."""
    measured = rows.read(results / "cpu-batches.jsonl", Step)
    if not measured:
        return NOT_MEASURED["cpu"]
    lines = ["| step | peak memory | of it the sampled vectors | processor time |", "|---|--:|--:|--:|"]
    for row in measured:
        cells = [row.pipeline, size(row.peak_bytes), size(row.config["vectors"])]
        lines.append(f"| {' | '.join(cells)} | {number(row.cpu_seconds_per_step or 0.0)} s |")
    head = f"{measured[0].title}. {machine_line(measured[0].about)} {commits(row.about for row in measured)}"
    return "\n".join([head, "", *lines])


def processes(device: str) -> Callable[[Path], str]:
    """Throughput of several gloo processes against one process of as many threads."""

    def section(results: Path) -> str:
        measured = rows.read(results / f"{device}-processes.jsonl", Step)
        if not measured:
            return NOT_MEASURED[device]
        lines = ["| images/s | processes of one thread | one process of as many threads | ratio |", "|---|--:|--:|--:|"]
        for title in dict.fromkeys(row.title for row in measured):
            many, one = (row.images_per_second for row in measured if row.title == title)
            count = next(row.config["processes"] for row in measured if row.title == title)
            what = f"{title.removeprefix('Stage 1, ')}; {count} processes"
            lines.append(f"| {what} | {many:.0f} | {one:.0f} | {times(many / one)} |")
        others = max(row.others or 0.0 for row in measured)
        head = f"{machine_line(measured[0].about)} {commits(row.about for row in measured)}"
        return "\n".join([f"{head} Other processes used at most {others:.2f} cores.", "", *lines])

    return section


def picture(title: str, name: str) -> str:
    """A link to a picture of `benchmarks.report.pictures`."""
    return f"![{title}](pictures/{name}.png)"


def provenance(measured: list[Row]) -> str:
    """Machine, ceilings and commits of the rows."""
    about, ceilings = measured[0].about, measured[0].ceilings
    others = max((row.others for row in measured if row.others is not None), default=None)
    alone = "" if others is None else f" Other processes used at most {others:g} cores."
    return (
        f"{machine_line(about)} Ceilings of the run: product {ceilings['product_flops'] / 1e9:.0f} Gflop/s "
        f"({measured[0].dtype}), copy {ceilings['copy_bytes'] / 1e9:.1f} GB/s. "
        f"{commits(row.about for row in measured)}{alone}"
    )


def commits(abouts: Iterable[dict[str, object]]) -> str:
    """Commits of the rows."""
    states = {f"{about['commit']}{' with changes' if about['dirty'] else ''}" for about in abouts}
    return f"Commit {', '.join(sorted(states))}."


def machine_line(about: dict[str, object]) -> str:
    """Device and versions."""
    cuda = f", CUDA {about['cuda']}, Triton {about['triton']}" if about["cuda"] else ""
    alone = about["threads"] == 1 and not about["cuda"]
    threads = "1 thread, processor time" if alone else f"{about['threads']} threads"
    return f"{about['device_name']}, {threads}, torch {about['torch']}{cuda}."


def label(row: Row) -> str:
    """Operator, sizes and group of the case."""
    sizes = ", ".join(f"{name} {value}" for name, value in row.shape.items())
    passes = "" if row.training else ", forward"
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return f"`{row.operator}` {sizes}{passes}{dtype}" + (f" ({row.group})" if row.group else "")


def median(row: Row) -> float:
    """Milliseconds."""
    assert row.milliseconds is not None
    return row.milliseconds["p50"]


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def times(value: float) -> str:
    """A quotient of times."""
    return f"{value:.2f}×"


def size(value: int | None) -> str:
    """Bytes in a readable unit."""
    if value is None:
        return "–"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{number(value / scale)} {unit}"
    return f"{value} B"


def escape(text: str | None) -> str:
    """Text for a table's cell."""
    return (text or "").replace("|", "\\|")


SECTIONS: dict[str, Callable[[Path], str]] = {
    f"{device}-{name}": section
    for device in (*PROCESSORS, "cuda")
    for name, section in (
        ("summary", summary(device)),
        ("kernels", details(device, "kernels")),
        ("scaling", details(device, "scaling")),
        ("grid", grid(device)),
        ("limits", limits(device)),
        ("losses", losses(device)),
        ("crossovers", crossovers(device)),
        ("training", training_steps(device)),
        ("execution", execution(device)),
        ("processes", processes(device)),
        ("small", details(device, "small")),
    )
}
SECTIONS["cpu-batches"] = batches
