"""The table of a sweep as Markdown: means and spreads, classes one by one, the paper's figures, trends, notes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomem.files import write_atomically
from anomem.reproduce.experiments import EXPERIMENTS, Experiment
from anomem.reproduce.sweep import read_sweep
from anomem.reproduce.trends import Values

DASH = "–"
MEASURES = {
    ("cost", "parameters"): "encoder's parameters",
    ("cost", "seconds"): "seconds a step",
    ("cost", "cpu_seconds"): "CPU seconds a step",
    ("overlap", "normals"): "overlap",
    ("overlap", "anomalies"): "of anomalies",
    ("overlap", "chance"): "chance",
    ("lead", "pixel_auroc"): "pixel AUROC",
    ("lead", "aupro"): "AUPRO",
    ("lead", "aupimo"): "AUPIMO",
}
"""Headings of the further columns."""
SUMMARISED = (
    *(("cost", measure) for measure in ("parameters", "seconds", "cpu_seconds")),
    *(("overlap", measure) for measure in ("anomalies", "chance")),
)
"""Of those, the ones that are not shown class by class."""
EXPLAINED = {
    "plain": "`plain`: λ-weighted mean of 1 − cos(z, HF(z)); the paper's one-class setting",
    "detector": "`detector`: Gaussians on the deviations z − HF(z)",
    "detector/features": "`detector/features`: the same Gaussians on the features z, without memory",
    "stage2": "`stage2`: radius of the heads trained on labelled anomalies",
    "linear": "`linear`: a linear classifier on frozen features of stage 1",
    "lead": "image AUROC of the score that decides; maps of the Gaussians at each position",
}
OVERLAP = (
    "overlap %: share of the test normals whose nearest neighbour among prototypes and anomalies is a prototype, by "
    "the vector at one random position of each image; of anomalies: the same share of them; chance: M / (M + anomalies)"
)


def write_table(sweep: Path) -> Path:
    """Write `table.md` from the rows of a sweep; it shows the pictures that are there.

    Args:
        sweep: its folder.

    Returns:
        The table.

    Raises:
        UserError: the folder holds no sweep or no row.
    """
    path = sweep / "table.md"
    write_atomically(path, markdown(sweep).encode())
    return path


def markdown(sweep: Path) -> str:
    """The table as text; see `write_table`."""
    header, rows = read_sweep(sweep)
    experiment = EXPERIMENTS[header["experiment"]]
    values = Values(rows)
    lines = [f"# {experiment.title} ({header['data']})", "", *_about(header, rows), ""]
    lines += _means(experiment, values, header["data"], rows)
    lines += [
        "",
        *_paper_note(experiment, header["data"]),
        *(f"- {sentence}" for sentence in experiment.trend(values)),
        "",
    ]
    lines += _classes(experiment, values)
    notes = [f"`{name}`: {s.about}" for name, s in experiment.settings.items() if s.about and _has(rows, name)]
    notes += [text for name, text in EXPLAINED.items() if name in experiment.scores]
    notes += [OVERLAP] if ("overlap", "normals") in experiment.extra else []
    lines += ["", *(f"- {note}." for note in notes)]
    pictures = sorted((sweep / "pictures").glob("*.png"))
    lines += ["", *(f"![{picture.stem}](pictures/{picture.name})" for picture in pictures)] if pictures else []
    return "\n".join(_without_gaps(lines)) + "\n"


def shown(values: Sequence[float], percent: bool = True) -> str:
    """Mean, and standard deviation where there are several: "91.52 ± 0.08"."""
    if not values:
        return DASH
    factor = 100 if percent else 1
    mean = statistics.mean(values) * factor
    if not percent:
        return f"{mean:,.0f}" if mean >= 1000 else f"{mean:.3g}"
    spread = f" ± {statistics.stdev(values) * factor:.2f}" if len(values) > 1 else ""
    return f"{mean:.2f}{spread}"


def _about(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    planned = header.get("cells", len(rows))
    seeds = sorted({row["seed"] for row in rows})
    scale = ", ".join(f"{name} {value}" for name, value in header["scale"].items() if value is not None)
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    threads = ", ".join(str(t) for t in sorted({row["threads"] for row in rows}))
    precision = ", ".join(sorted({row.get("precision", "float32") for row in rows}))  # the first sweeps knew no other
    images = sorted({row["train_images"] for row in rows})
    lines = [
        *(f"`{command}`\n" for command in (header["command"], *header.get("continued", ()))),
        f"Commit {header['commit']}, torch {header['torch']}, {header['processor']}, {precision}, {threads} thread(s) "
        f"a cell. {len(rows)} cells, {minutes:.1f} CPU minutes; seeds {', '.join(map(str, seeds))}; {images[0]} to "
        f"{images[-1]} training images; {f'scaled down: {scale}' if scale else 'not scaled down'}.",
    ]
    if len(rows) < planned:
        lines += ["", f"**Not complete: {len(rows)} of {planned} cells.** The same command goes on."]
    return lines


def _means(experiment: Experiment, values: Values, data: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Setting × score: mean over the classes, then mean and standard deviation over the seeds, in percent."""
    paper = experiment.paper.get(data, {})
    scores = [score for score in experiment.scores if any(values.of(n, score) for n in experiment.settings)]
    headings = ["setting", *(f"AUROC % `{score}`" for score in scores)]
    headings += [MEASURES[extra] for extra in experiment.extra] + (["paper"] if paper else [])
    table = [headings, ["---"] * len(headings)]
    for name in experiment.settings:
        if not _has(rows, name):
            continue
        cells = [shown(values.by_seed(name, score)) for score in scores]
        cells += [shown(values.by_seed(name, *extra), extra[0] != "cost") for extra in experiment.extra]
        cells += [f"{paper[name]:.2f}" if name in paper else DASH] if paper else []
        table.append([name, *cells])
    return [_line(row) for row in table]


def _classes(experiment: Experiment, values: Values) -> list[str]:
    """Setting × class: mean over the seeds of the experiment's own score, and of the measures of its maps."""
    classes = list(dict.fromkeys(row["normal"] for row in values.rows))
    named = {row["normal"]: row["class"] for row in values.rows}
    if len(classes) < 2:
        return []
    score = experiment.scores[0]
    columns = [(score, "auroc", f"`{score}`")]
    columns += [(*extra, MEASURES[extra]) for extra in experiment.extra if extra not in SUMMARISED]
    lines: list[str] = []
    for entry, measure, heading in columns:
        table = [["setting", *(named[c] for c in classes), "mean"], ["---"] * (len(classes) + 2)]
        for name in experiment.settings:
            found = values.of(name, entry, measure)
            by_class = [[x for (normal, _), x in found.items() if normal == c] for c in classes]
            if found:
                known = [statistics.mean(x) for x in by_class if x]
                table.append([name, *(shown(x) for x in by_class), f"{100 * statistics.mean(known):.2f}"])
        if len(table) > 2:
            what = "AUROC" if measure == "auroc" else heading
            lines += ["", f"{what} % class by class{f', {heading}' if measure == 'auroc' else ''}:", ""]
            lines += [_line(row) for row in table]
    return lines


def _paper_note(experiment: Experiment, data: str) -> list[str]:
    if not experiment.paper or data in experiment.paper:
        return []
    names = " and ".join(experiment.paper)
    return [f"The paper's figures are of {names}; only the trend can be compared here.", ""]


def _has(rows: Sequence[Mapping[str, Any]], setting: str) -> bool:
    return any(row["setting"] == setting for row in rows)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _without_gaps(lines: Sequence[str]) -> list[str]:
    """No two empty lines together."""
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return kept
