"""The picture of a sweep: every setting's score, seed by seed, readable with any colour vision."""

from __future__ import annotations

import statistics
from pathlib import Path

from anomem.reproduce.experiments import EXPERIMENTS, Experiment
from anomem.reproduce.sweep import read_sweep
from anomem.reproduce.tables import MEASURES
from anomem.reproduce.trends import Values

MARKERS = ("o", "D", "^", "s", "v", "P", "X", "*")


def draw(sweep: Path) -> Path:
    """Draw `pictures/summary.png`: settings below each other, AUROC of each score, mean over classes, a mark a seed.

    Args:
        sweep: folder with at least one row.

    Returns:
        The picture.

    Raises:
        UserError: the folder holds no finished cell.
    """
    header, rows = read_sweep(sweep)
    experiment, values = EXPERIMENTS[header["experiment"]], Values(rows)
    path = sweep / "pictures" / "summary.png"
    title = f"{experiment.title} ({header['data']})"
    if header["experiment"] == "margin":
        _margins(experiment, values, title, path)
    else:
        _settings(experiment, values, title, path)
    return path


def _settings(experiment: Experiment, values: Values, title: str, path: Path) -> None:
    from anomem.plots.style import AMBER, BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, figure

    names = [name for name in experiment.settings if any(row["setting"] == name for row in values.rows)]
    colours = (AMBER, BLUE, GREEN, ORANGE, PURPLE, SKY, INK)
    with figure(path, 6.8, 1.4 + 0.34 * len(names)) as fig:
        axes = fig.subplots()
        axes.hlines(range(len(names)), 0, 1, color=FAINT, linewidth=0.8, zorder=0, transform=axes.get_yaxis_transform())
        shares = [extra for extra in experiment.extra if extra[0] != "cost"]
        drawn = [(score, "auroc", score) for score in experiment.scores]
        drawn += [(*extra, MEASURES[extra].replace("of anom", "overlap of anom")) for extra in shares]
        for (score, measure, label), colour, marker in zip(drawn, colours, MARKERS, strict=False):
            points = [(x, y) for y, name in enumerate(names) for x in values.by_seed(name, score, measure)]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=42, marker=marker, edgecolors=colour, facecolors="none", label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(f"{'AUROC or share' if shares else 'AUROC'}, mean over the classes; one mark a seed")
        axes.set_title(title)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _margins(experiment: Experiment, values: Values, title: str, path: Path) -> None:
    """AUROC against M, a line for each ratio of labels; the adaptive margin as a dashed level."""
    from anomem.plots.style import figure, shades

    margins = [name for name in experiment.scores if name.startswith("M = ")]
    with figure(path, 6.4, 4.0) as fig:
        axes = fig.subplots()
        colours = shades(len(experiment.settings))
        for i, (setting, colour, marker) in enumerate(zip(experiment.settings, colours, MARKERS, strict=False)):
            found = {name: values.by_seed(setting, name) for name in (*margins, "adaptive")}
            if not found["adaptive"]:
                continue
            means = [statistics.mean(found[name]) for name in margins]
            spreads = [statistics.stdev(found[name]) if len(found[name]) > 1 else 0.0 for name in margins]
            places = [place + 0.06 * (i - 1) for place in range(len(margins))]  # the bars lie beside each other
            axes.errorbar(places, means, spreads, color=colour, marker=marker, capsize=3, label=setting)
            axes.axhline(statistics.mean(found["adaptive"]), color=colour, linestyle=(0, (4, 2)), linewidth=1.0)
        axes.set_xticks(range(len(margins)), [name.removeprefix("M = ") for name in margins])
        axes.set_xlabel("M; dashed: adapted while training")
        axes.set_ylabel("AUROC of stage 2")
        axes.set_title(title)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
