"""From scores to yes or no: split-conformal p-values, a false-alarm rate, a false discovery rate, a pixel threshold.

With n calibration normals that were not fitted, `p = (1 + #{calibration scores ≥ s}) / (n + 1)` (Vovk et al. 2005).
A new normal that is exchangeable with them has `p ≤ alpha` with a probability of at most alpha, whatever the score is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.validation import percent, require, require_choice

Held = Literal["split", "cross"]
HELD_PART = 0.3
"""Of the normals, held out of the fit to calibrate with."""
FOLDS = 5


class Fold(NamedTuple):
    """Rows of the normals, int64, in one round of fitting and calibrating."""

    fit: Tensor
    calibrate: Tensor


def normals_needed(alpha: float) -> int:
    """Fewest calibration normals with which a p-value can reach alpha: 1/alpha − 1, rounded up.

    Args:
        alpha: false-alarm rate in (0, 1).
    """
    check_alpha(alpha)
    # 1 / 0.01 is not quite 100 for every such alpha.
    return math.ceil(round(1 / alpha, 6)) - 1


def check_alpha(alpha: float, name: str = "alpha") -> None:
    """Raise `ArgumentError` unless a rate is in (0, 1)."""
    require(0 < alpha < 1, name, "a rate between 0 and 1", alpha)


def hold_out(normals: int, alpha: float, seed: int = 0) -> tuple[Held, list[Fold]]:
    """Which normals calibrate.

    Where `HELD_PART` of the normals are enough for alpha they are held out ("split", one fold, an exact promise).
    Where they are too few, `FOLDS` fits leave out one part each ("cross"): every normal is scored by a fit without it,
    new images by a fit of all. Scores of that last fit tend to be lower on normals, so the rate tends to be below
    alpha; it is not proven. A single normal is fitted: nothing calibrates.

    Args:
        normals: N, at least one.
        alpha: wanted false-alarm rate.
        seed: of the shuffle.

    Returns:
        The method, and its folds.

    Raises:
        ArgumentError: no normal or a rate outside of (0, 1).
    """
    require(normals >= 1, "images", "at least one normal", normals)
    needed = normals_needed(alpha)
    order = torch.randperm(normals, generator=torch.Generator().manual_seed(seed))
    held = int(normals * HELD_PART)
    if normals == 1:
        return "cross", []
    if held >= needed:
        return "split", [Fold(order[held:].sort().values, order[:held].sort().values)]
    parts = [part for part in order.tensor_split(min(FOLDS, normals)) if len(part)]
    folds = []
    for i, part in enumerate(parts):
        others = torch.cat([other for j, other in enumerate(parts) if j != i])
        folds.append(Fold(others.sort().values, part.sort().values))
    return "cross", folds


@dataclass(frozen=True)
class Calibration:
    """Scores of normals that were not fitted; decides about new scores.

    Example:
        >>> calibration = Calibration({"plain": torch.arange(99.0)})
        >>> calibration.p_values("plain", torch.tensor([50.0, 1000.0]))
        tensor([0.5000, 0.0100], dtype=torch.float64)
        >>> calibration.anomalous("plain", torch.tensor([50.0, 1000.0]), alpha=0.01)
        tensor([False,  True])
    """

    scores: Mapping[str, Tensor]
    """Name of a score -> [n] of the calibration normals, in any order; higher is more anomalous. Where n = 0 every
    p-value is 1."""
    maxima: Mapping[str, Tensor] | None = None
    """Name of a map -> [n], the largest value in each calibration normal's map."""
    held: Held = "split"
    """How the calibration normals were kept out of the fit; see `hold_out`."""

    def __post_init__(self) -> None:
        require_choice(self.held, "held", get_args(Held))
        object.__setattr__(self, "scores", {name: _sorted(s, "scores") for name, s in self.scores.items()})
        object.__setattr__(self, "maxima", {name: _sorted(s, "maxima") for name, s in (self.maxima or {}).items()})
        counts = {len(s) for s in self.scores.values()}
        require(len(counts) == 1, "scores", "the same number of each score", sorted(counts))

    @property
    def count(self) -> int:
        """n."""
        return len(next(iter(self.scores.values())))

    @property
    def least_alpha(self) -> float:
        """Smallest false-alarm rate that n normals allow, 1 / (n + 1)."""
        return 1 / (self.count + 1)

    def p_values(self, name: str, scores: Tensor) -> Tensor:
        """p of new scores: the share of calibration normals, the new image among them, that score at least as high.

        Args:
            name: of the score.
            scores: [B], finite.

        Returns:
            [B] float64 in [1/(n + 1), 1].
        """
        calibration = _named(self.scores, name, "score")
        require(bool(scores.isfinite().all()), "scores", "finite numbers", "NaN or infinity")
        below = torch.searchsorted(calibration, scores.detach().cpu().double().contiguous())
        return (1 + self.count - below).double() / (self.count + 1)

    def anomalous(self, name: str, scores: Tensor, alpha: float = 0.01) -> Tensor:
        """The verdict `p ≤ alpha` of new scores: [B] bool.

        Raises:
            ArgumentError: too few calibration normals for this alpha: no image could ever be called anomalous.
        """
        self.check(alpha)
        return self.p_values(name, scores) <= alpha * (1 + 1e-12)  # k/(n + 1) may round above the same alpha

    def pixel_threshold(self, name: str, alpha: float = 0.01) -> float:
        """What a map exceeds anywhere in at most a part alpha of normal images.

        The conformal quantile of the maps' maxima: the ceil((n + 1)(1 − alpha))-th smallest of n.

        Args:
            name: of the map.
            alpha: rate of normal images with any pixel above the threshold.

        Raises:
            ArgumentError: as `anomalous`.
        """
        self.check(alpha)
        return _quantile(_named(self.maxima or {}, name, "map"), alpha)

    def threshold(self, name: str, alpha: float = 0.01) -> float:
        """The score above which `anomalous` says yes.

        Args:
            name: of the score.
            alpha: false-alarm rate.

        Raises:
            ArgumentError: as `anomalous`.
        """
        self.check(alpha)
        return _quantile(_named(self.scores, name, "score"), alpha)

    def check(self, alpha: float) -> None:
        """Raise `ArgumentError` where an alpha needs more calibration normals than there are."""
        needed = normals_needed(alpha)
        require(
            self.count >= needed,
            "alpha",
            lambda: (
                f"at least {self.least_alpha:.3g}, the least that {self.count} calibration normals allow"
                if self.count
                else "a detector with calibration normals"
            ),
            alpha,
            f"{alpha:.3g} needs {needed} normals that are not fitted",
        )

    def promise(self, alpha: float) -> str:
        """In one sentence what may be expected of the verdict at an alpha."""
        check_alpha(alpha)
        if self.count == 0:
            return (
                "the only normal image is fitted and none is left to calibrate with: scores and maps rank images, "
                "every p-value is 1"
            )
        normals = f"{self.count} calibration normal{'s' if self.count > 1 else ''}"
        if self.count < normals_needed(alpha):
            return (
                f"{normals} cannot promise a false-alarm rate of {percent(alpha)}: that takes {normals_needed(alpha)}; "
                f"the least they allow is {percent(self.least_alpha)}"
            )
        if self.held == "cross":
            return f"about {percent(alpha)} of normal images called anomalous ({normals}, cross-fitted: no proof)"
        return f"at most {percent(alpha)} of normal images called anomalous ({normals}, held out of the fit)"

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores: "scores.NAME" and "maxima.NAME" -> [n] float64."""
        groups = (("scores", self.scores), ("maxima", self.maxima or {}))
        return {f"{group}.{name}": values for group, named in groups for name, values in named.items()}

    def settings(self) -> dict[str, str]:
        """What a JSON file stores beside the tensors."""
        return {"held": self.held}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Calibration:
        """From `tensors` and `settings`.

        Raises:
            ArgumentError: a tensor of another name, or an unknown setting's value.
        """
        groups: dict[str, dict[str, Tensor]] = {"scores": {}, "maxima": {}}
        for key, values in tensors.items():
            group, _, name = key.partition(".")
            require(group in groups and name != "", "tensors", "scores.NAME or maxima.NAME", key)
            groups[group][name] = values
        return cls(groups["scores"], groups["maxima"], settings.get("held", "split"))


def benjamini_hochberg(p_values: Tensor, rate: float = 0.05) -> Tensor:
    """Which of a batch to call anomalous so that of those called at most a part `rate` are normal on average.

    Benjamini and Hochberg 1995: the largest k with p_(k) ≤ rate · k / B, and all p up to p_(k). It holds for the
    p-values of one `Calibration`, which depend on each other positively (Bates et al. 2023).

    Args:
        p_values: [B] in (0, 1].
        rate: false discovery rate in (0, 1).

    Returns:
        [B] bool.
    """
    check_alpha(rate, "rate")
    require(p_values.dim() == 1, "p_values", "a tensor [B]", p_values)
    right = bool(((p_values > 0) & (p_values <= 1)).all())
    require(right, "p_values", "numbers above 0 and at most 1", "others")
    count = len(p_values)
    ranked = p_values.double().sort().values
    steps = torch.arange(1, count + 1, dtype=torch.float64, device=p_values.device)
    passed = (ranked <= rate * steps / max(count, 1) * (1 + 1e-12)).nonzero().flatten()
    if not len(passed):
        return torch.zeros(count, dtype=torch.bool, device=p_values.device)
    return p_values.double() <= ranked[passed[-1]]


def _quantile(values: Tensor, alpha: float) -> float:
    """The ceil((n + 1)(1 − alpha))-th smallest of n sorted values."""
    rank = math.ceil((len(values) + 1) * (1 - alpha) - 1e-9)
    return float(values[min(rank, len(values)) - 1])


def _sorted(scores: Tensor, argument: str) -> Tensor:
    require(scores.dim() == 1, argument, "a tensor [n]", scores)
    require(bool(scores.isfinite().all()), argument, "finite numbers", "NaN or infinity")
    return scores.detach().cpu().double().sort().values


def _named(values: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    if name not in values:
        raise ArgumentError("name", f"a calibrated {what}: {', '.join(values) or 'none'}", repr(name))
    return values[name]
