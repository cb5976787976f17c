"""What people read: means over classes, and the goals."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from rich.table import Table

from benchmarks.accuracy.rows import Row
from benchmarks.accuracy.tasks import DIGITS, OTHER_DIGITS, TEXTURES

TEN = tuple(sorted((*DIGITS, *OTHER_DIGITS)))


@dataclass(frozen=True)
class Group:
    """Classes that are averaged."""

    name: str
    dataset: str
    normals: tuple[str, ...]
    anomalies: str
    measure: str
    """"auroc" or "pixel_auroc"."""


GROUPS = (
    Group("digits 3, 8, 9", "digits", DIGITS, "classes", "auroc"),
    Group("digits, all ten", "digits", TEN, "classes", "auroc"),
    Group("textures against photographs", "textures", TEXTURES, "photographs", "auroc"),
    Group("scratches on textures, pixels", "textures", TEXTURES, "scratch", "pixel_auroc"),
)

GOALS = (
    (GROUPS[0], "one-class", "plain", 0.92),
    (GROUPS[0], "one-class", "detector", 0.985),
    (GROUPS[0], "synthetic outliers", "plain", 0.975),
    (GROUPS[0], "synthetic outliers", "stage2", 0.98),
    (GROUPS[0], "outlier exposure", "stage2", 0.985),
    (GROUPS[1], "one-class", "detector", 0.99),
    (GROUPS[2], "one-class", "detector", 0.94),
    (GROUPS[3], "one-class", "detector", 0.75),
)
"""Group, setting, score and the mean to reach."""


def seeds_of(rows: list[Row], group: Group, setting: str, score: str) -> dict[int, list[float]]:
    """Seed -> numbers of all classes, in the group's order; only seeds that have every class.

    Args:
        rows: of any jobs.
        group: which classes and which measure.
        setting: as in `SETTINGS`.
        score: its name.
    """
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        value = getattr(row, group.measure)
        same = (row.dataset, row.anomalies, row.setting, row.score) == (group.dataset, group.anomalies, setting, score)
        if same and row.normal in group.normals and value is not None:
            found.setdefault(row.seed, {})[row.normal] = value
    return {
        seed: [values[normal] for normal in group.normals]
        for seed, values in sorted(found.items())
        if len(values) == len(group.normals)
    }


def group_table(rows: list[Row], group: Group) -> Table:
    """Every setting and score of a group: mean over classes for each seed, and the worst class.

    Args:
        rows: of any jobs.
        group: which classes and which measure.
    """
    table = Table(title=f"{group.name}: {group.measure.replace('_', ' ').replace('auroc', 'AUROC')}")
    for name in ("setting", "score"):
        table.add_column(name)
    for name in ("mean, seed by seed", "worst class"):
        table.add_column(name, justify="right")
    pairs = dict.fromkeys((row.setting, row.score) for row in rows)
    for setting, score in pairs:
        seeds = seeds_of(rows, group, setting, score)
        if seeds:
            means = "  ".join(f"{mean(values):.4f}" for values in seeds.values())
            table.add_row(setting, score, means, f"{min(min(values) for values in seeds.values()):.4f}")
    return table


def goal_table(rows: list[Row]) -> Table:
    """The goals and what was reached.

    Args:
        rows: of any jobs.
    """
    table = Table(title="Goals")
    for name in ("group", "setting", "score"):
        table.add_column(name)
    for name in ("at least", "reached, seed by seed"):
        table.add_column(name, justify="right")
    table.add_column("")
    for group, setting, score, least in GOALS:
        means = [mean(values) for values in seeds_of(rows, group, setting, score).values()]
        verdict = "not run" if not means else "reached" if min(means) >= least else "missed"
        table.add_row(group.name, setting, score, str(least), "  ".join(f"{x:.4f}" for x in means), verdict)
    return table
