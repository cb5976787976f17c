"""Trends in words: does what the paper finds hold in these cells, does it not, or can it not be told?

Two settings are compared on the same classes and seeds. Their mean difference is called a difference when its 95%
confidence interval over these pairs (Student's t) excludes zero; below three pairs nothing is told.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST = 3
"""Pairs of class and seed below which nothing is told."""
STUDENT = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5% quantiles of Student's t for 2 to 30 degrees of freedom; the last one stands for more."""


@dataclass(frozen=True)
class Values:
    """The rows of a sweep.

    Example:
        >>> values = Values(read_rows(Path("runs/table7/rows.jsonl")))
        >>> values.of("exponential", "plain")  # {("3", 0): 0.94, …}
    """

    rows: Sequence[Mapping[str, Any]]

    def of(self, setting: str, score: str, measure: str = "auroc") -> dict[tuple[str, int], float]:
        """(class, seed) -> number, of the cells that have it.

        Args:
            setting: name of the setting.
            score: entry of the metrics.
            measure: of that entry.
        """
        return {
            (row["normal"], row["seed"]): row["metrics"][score][measure]
            for row in self.rows
            if row["setting"] == setting and measure in row["metrics"].get(score, {})
        }

    def by_seed(self, setting: str, score: str, measure: str = "auroc") -> list[float]:
        """Mean over the classes of each seed; of seeds that have all classes of the setting."""
        found = self.of(setting, score, measure)
        classes, seeds = {normal for normal, _ in found}, sorted({seed for _, seed in found})
        whole = [s for s in seeds if all((normal, s) in found for normal in classes)]
        return [statistics.mean(found[normal, seed] for normal in sorted(classes)) for seed in whole]


@dataclass(frozen=True)
class Difference:
    """Of one setting from another over the same classes and seeds."""

    mean: float
    error: float
    """Standard error of the mean; NaN for fewer than two pairs."""
    pairs: int

    @property
    def verdict(self) -> int | None:
        """1 or −1 where the 95% interval excludes zero, 0 where not, None where there are too few pairs."""
        if self.pairs < FEWEST:
            return None
        quantile = STUDENT[min(self.pairs - FEWEST, len(STUDENT) - 1)]
        return 0 if abs(self.mean) <= quantile * self.error else int(math.copysign(1, self.mean))

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return f"{self.mean:+.4f}{error} ({self.pairs} pair{'s' if self.pairs != 1 else ''})"


def difference(first: Mapping[Any, float], second: Mapping[Any, float]) -> Difference:
    """Mean of first − second over the keys that both have."""
    pairs = [first[key] - second[key] for key in first if key in second]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else math.nan
    return Difference(statistics.mean(pairs) if pairs else math.nan, error, len(pairs))


def ordered(
    names: Sequence[str], score: str, measure: str = "auroc", others: Sequence[str] = ()
) -> Callable[[Values], list[str]]:
    """The paper's order of settings, best first: each against the next.

    Args:
        names: settings, best first.
        score: entry of the metrics.
        measure: of that entry.
        others: settings that are only compared with the first, without a claim of the paper.
    """

    def sentences(values: Values) -> list[str]:
        found = []
        for better, worse in itertools.pairwise(names):
            gap = difference(values.of(better, score, measure), values.of(worse, score, measure))
            if not gap.pairs:
                continue
            verdict = {
                1: f"Expected and found: {better} is above {worse}",
                0: f"Cannot be told: {better} and {worse} differ by less than the 95% interval",
                -1: f"Disagrees: {better} was expected above {worse} and is below it",
                None: f"Cannot be told from so few cells: {better} against {worse}",
            }[gap.verdict]
            found.append(f"{verdict}; {_named(score, measure)} {gap}.")
        for other in others:
            if other in names:
                continue
            gap = difference(values.of(other, score, measure), values.of(names[0], score, measure))
            if gap.pairs:
                change = {1: "above", 0: "not told apart from", -1: "below", None: "against (too few cells)"}[
                    gap.verdict
                ]
                found.append(f"{other}: {change} {names[0]}; {_named(score, measure)} {gap}.")
        return found

    return sentences


def no_difference(names: Sequence[str], score: str, what: str) -> Callable[[Values], list[str]]:
    """The paper finds no sensitivity: the best setting against the worst.

    Args:
        names: settings.
        score: entry of the metrics.
        what: is varied.
    """

    def sentences(values: Values) -> list[str]:
        known = {name: values.of(name, score) for name in names}
        means = {name: statistics.mean(found.values()) for name, found in known.items() if found}
        if len(means) < 2:
            return []
        best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        gap = difference(known[best], known[worst])
        verdict = {
            1: f"Disagrees: {what} matters here",
            0: f"Expected and found: no sensitivity to {what} beyond the noise",
            -1: f"Disagrees: {what} matters here",
            None: f"Cannot be told from so few cells: sensitivity to {what}",
        }[gap.verdict]
        return [f"{verdict}; the best ({best}) against the worst ({worst}): {_named(score, 'auroc')} {gap}."]

    return sentences


def best_margin(margins: Sequence[str], expected: str = "M = 2") -> Callable[[Values], list[str]]:
    """The paper takes M = 2: each other margin, fixed or adaptive, against it, for each ratio of labels.

    Args:
        margins: names of the fixed margins.
        expected: the paper's.
    """

    def sentences(values: Values) -> list[str]:
        found = []
        ratios = tuple(dict.fromkeys(row["setting"] for row in values.rows))
        for settings in [(ratio,) for ratio in ratios] + ([ratios] if len(ratios) > 1 else []):
            fixed = _joined(values, settings, expected)
            groups: dict[int | None, list[str]] = {}
            for name in (*margins, "adaptive"):
                gap = difference(fixed, _joined(values, settings, name))
                if name != expected and gap.pairs:
                    groups.setdefault(gap.verdict, []).append(f"{name} ({gap})")
            relations = {1: "is above", 0: "is not told apart from", -1: "is below", None: "too few cells against"}
            parts = [f"{relations[v]} {', '.join(groups[v])}" for v in relations if v in groups]
            if parts:
                which = settings[0] if len(settings) == 1 else "All ratios together"
                found.append(f"{which}: {expected} {'; '.join(parts)}. The paper takes {expected}.")
        return found

    return sentences


def _joined(values: Values, settings: Sequence[str], score: str) -> dict[tuple[str, str, int], float]:
    """(setting, class, seed) -> AUROC of a score in several settings."""
    return {(name, *key): x for name in settings for key, x in values.of(name, score).items()}


def near_prototypes(values: Values) -> list[str]:
    """Figure 5: test normals lie among the prototypes, anomalies do not; and more so than without training."""
    found = []
    normals, anomalies = (values.of("trained", "overlap", measure) for measure in ("normals", "anomalies"))
    gap = difference(normals, anomalies)
    if gap.pairs:
        verdict = {
            1: "Expected and found: normals have a prototype as nearest neighbour more often than anomalies have",
            0: "Cannot be told: normals and anomalies differ by less than the 95% interval in how often a prototype is "
            "their nearest neighbour",
            -1: "Disagrees: normals have a prototype as nearest neighbour less often than anomalies have",
            None: "Cannot be told from so few cells: whether normals are nearer to prototypes than anomalies",
        }[gap.verdict]
        found.append(f"{verdict}; shares differ by {gap}.")
    return found + ordered(("trained", "untrained"), "overlap", "normals")(values)


def _named(score: str, measure: str) -> str:
    return f"AUROC of `{score}`" if measure == "auroc" else f"{score} of the {measure}"
