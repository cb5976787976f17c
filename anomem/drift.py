"""Drift: a conformal martingale over p-values says when normals no longer look like those of the calibration.

While the stream is exchangeable with the calibration normals, its p-values p are uniform, once the steps of 1/(n + 1)
are smoothed. A bet on small p multiplies the capital S by f(p) = ε p^(ε − 1), whose mean over uniform p is 1 (Vovk,
Nouretdinov and Gammerman 2003, power martingale). The simple mixture over ε,

    S_t = ∫₀¹ Π_i ε p_i^(ε − 1) dε,

needs no choice of ε. By Ville's inequality S ever reaches 1/δ with a probability of at most δ. That is exact for the
p-values of `OnlinePValues`. Those of one fixed calibration set depend on each other: S can grow by itself over streams
longer than the calibration set.

Single anomalies move S as drift does. To ask about the normals only, p-values at or below `ignore` are left out and the
others scaled to (0, 1]: those are uniform again.
"""

from __future__ import annotations

import bisect
import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.errors import UserError
from anomem.validation import percent, require

FEWEST_STEPS, MOST_STEPS = 8, 20_001
"""Different p-values from which their step can be told, and most steps that are tried."""
POINTS = 400
"""Of ε, for the integral."""


class Martingale:
    """The capital of a bet against exchangeability, p-value by p-value.

    Args:
        false_alarm: δ, the bound on the probability that an exchangeable stream ever raises the alarm.
        ignore: p-values up to this are anomalies and no evidence of drift; 0 counts all.
        steps: n + 1 of the calibration; p-values are multiples of 1/steps and are spread evenly over their step by
            `seed`. None takes them as they are.
        seed: of the spreading.

    Example:
        >>> drift = Martingale(false_alarm=0.01)
        >>> for p in p_values:
        ...     if drift.update(p):
        ...         print("drift after", drift.seen, "images")
    """

    def __init__(self, false_alarm: float = 0.01, ignore: float = 0.0, steps: int | None = None, seed: int = 0) -> None:
        require(0 < false_alarm < 1, "false_alarm", "a rate between 0 and 1", false_alarm)
        require(0 <= ignore < 1, "ignore", "a rate from 0 up to 1", ignore)
        self.false_alarm, self.ignore, self.steps = false_alarm, ignore, steps
        self.generator = torch.Generator().manual_seed(seed)
        # Midpoints of equal parts of (0, 1): the mean over them is the integral.
        self.bets = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        self.logs = torch.zeros(POINTS, dtype=torch.float64)
        self.seen = 0
        self.alarm_at: int | None = None
        """Number of images after which the alarm was first raised."""
        self.path: list[float] = []
        """log10 S after each image."""

    @property
    def bound(self) -> float:
        """log10 of the capital at which the alarm is raised."""
        return -math.log10(self.false_alarm)

    @property
    def log_capital(self) -> float:
        """log10 S."""
        return float((self.logs.logsumexp(0) - math.log(POINTS)) / math.log(10))

    def update(self, p: float) -> bool:
        """Bet on one p-value in (0, 1]. Returns whether it raised the alarm, which it does once."""
        require(0 < p <= 1, "p", "a p-value above 0 and at most 1", p)
        self.seen += 1
        if self.steps is not None:
            # p = k/steps is uniform on (0, 1] after a uniform part of a step is taken off.
            p = max(p - float(torch.rand((), generator=self.generator, dtype=torch.float64)) / self.steps, 1e-300)
        if p > self.ignore:
            scaled = (p - self.ignore) / (1 - self.ignore)
            self.logs += self.bets.log() + (self.bets - 1) * math.log(scaled)
        self.path.append(self.log_capital)
        if self.alarm_at is None and self.path[-1] >= self.bound:
            self.alarm_at = self.seen
            return True
        return False

    def over(self, p_values: Iterable[float] | Tensor) -> Martingale:
        """`update` with each in turn. Returns itself."""
        for p in p_values.tolist() if isinstance(p_values, Tensor) else p_values:
            self.update(p)
        return self

    def sentence(self) -> str:
        """In words, what the stream showed."""
        if self.alarm_at is not None:
            return (
                f"drift after {self.alarm_at} of {self.seen} images: the normals no longer look like the calibration's "
                f"(false alarm in at most {percent(self.false_alarm)} of streams)"
            )
        return f"no drift in {self.seen} images: log10 of the capital {self.log_capital:.2f}, alarm at {self.bound:.2f}"


class OnlinePValues:
    """Smoothed p-values of a stream among the calibration scores and all scores before it.

    Of an exchangeable stream they are independent and uniform (Vovk et al. 2005, proposition 2.8), so that the bound of
    `Martingale` is exact however few calibration scores there are.

    Args:
        calibration: [n] scores of normals that were not fitted.
        seed: of the smoothing.
    """

    def __init__(self, calibration: Tensor, seed: int = 0) -> None:
        self.scores = sorted(calibration.double().tolist())
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, score: float) -> float:
        """p of a score, in (0, 1); the score joins those that later ones are compared with."""
        left, right = bisect.bisect_left(self.scores, score), bisect.bisect_right(self.scores, score)
        higher, same = len(self.scores) - right, right - left + 1
        self.scores.insert(right, score)
        part = 1 - float(torch.rand((), generator=self.generator, dtype=torch.float64))  # in (0, 1]
        return (higher + part * same) / len(self.scores)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a .csv or .json file of `anomem score --output`, or the lines of `--json` in a .jsonl file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows: Any
        if file.suffix == ".json":
            rows = json.loads(text)
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def steps_of(p_values: Sequence[float]) -> int | None:
    """n + 1 of the calibration whose p-values k/(n + 1) these are, to spread them; None where they do not show it.

    Unspread p-values are too large rather than too small: the bound on false alarms holds, drift is found later.

    Args:
        p_values: in (0, 1].
    """
    different = torch.tensor(sorted(set(p_values)), dtype=torch.float64)
    if len(different) < FEWEST_STEPS:
        return None
    for steps in range(len(different), MOST_STEPS):
        scaled = different * steps
        if bool(((scaled - scaled.round()).abs() <= 1e-9 * steps).all()):
            return steps
    return None


def column(rows: Sequence[Mapping[str, Any]], name: str, file: Path) -> list[float]:
    """One column of numbers.

    Raises:
        UserError: no rows, no such column, or other values.
    """
    try:
        found = [float(row[name]) for row in rows]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{file}: expected scores with a column {name}, as `anomem score --output` writes of a fitted run ({error})"
        ) from error
    if not found or not all(math.isfinite(value) for value in found):
        raise UserError(
            f"{file}: expected finite numbers in the column {name}, received {'others' if found else 'none'}"
        )
    return found
