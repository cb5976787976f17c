"""A fitted detector: filled memories, what was fitted to their deviations, and the calibration of its decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anomem.data import Images
from anomem.data.convert import resize
from anomem.models import AnoMem
from anomem.scoring.config import FillConfig
from anomem.scoring.decision import Calibration, Fold, check_alpha, hold_out, normals_needed
from anomem.scoring.detector import Alignment
from anomem.scoring.filled import HELD_BYTES, FilledScale, FilledScorer, FilledScores, fill_memories
from anomem.scoring.labelled import FewLabels
from anomem.scoring.scorer import require_finite
from anomem.validation import require, require_choice, values_are_free

LABELLED = "labelled"
"""Name of the score that joins the labelled defects with the one-class score."""
FEWEST = 3
"""Normals: two to fit a Gaussian, one to calibrate."""
GAUSSIAN_BYTES = 2**30
"""Of the Gaussians of all positions while they are fitted; above it one Gaussian serves all positions."""


class Verdicts(NamedTuple):
    """What a detector says about B images; higher scores are more anomalous."""

    scores: dict[str, Tensor]
    """Name -> [B]; see `FilledScorer`, and "labelled" where there were labels."""
    p_values: Tensor
    """[B] float64 in (0, 1], of the leading score."""
    verdicts: Tensor | None
    """[B] bool, whether p ≤ alpha; None where too few normals calibrated for alpha."""
    maps: dict[str, Tensor]
    """"plain" and "local" -> [B, H, W] at the images' size."""


class FittedDetector(nn.Module):
    """Scores, p-values, verdicts and maps of images.

    Args:
        scorer: fitted.
        calibration: of its scores and maps.
        alpha: false-alarm rate of the verdict.
        labels: fitted to labelled defects, or None.
        batch_size: images per forward pass of a set.

    Shape:
        images [B, C, H, W], uint8 or float in [0, 1] -> `Verdicts`.

    Example:
        >>> detector = fit("photos/good", alpha=0.01)
        >>> scores, p_values, verdicts, maps = detector(images)
        >>> scores[detector.lead], verdicts  # [B], [B] bool
    """

    def __init__(
        self,
        scorer: FilledScorer,
        calibration: Calibration,
        alpha: float,
        labels: FewLabels | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        check_alpha(alpha)
        self.scorer, self.calibration, self.alpha, self.batch_size = scorer, calibration, alpha, batch_size
        self.labels = labels
        self.config: Any = None  # of the run it belongs to, to save it with
        self.eval()

    @property
    def model(self) -> AnoMem:
        """Encoder and memories."""
        return self.scorer.model

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its scores."""
        return ("plain", "local", "whole", "both", "either", *(() if self.labels is None else (LABELLED,)))

    @property
    def lead(self) -> str:
        """The score that decides: "labelled" after labels, else "both" for aligned images and "either" for others."""
        return self.scorer.lead if self.labels is None else LABELLED

    @torch.no_grad()
    def forward(self, images: Tensor, alpha: float | None = None, by: str | None = None) -> Verdicts:
        """See the class.

        Args:
            images: [B, C, H, W]; of another size than the fitted ones they are resized, their maps are not.
            alpha: another false-alarm rate than the detector's own.
            by: another score than the leading one.

        Raises:
            ArgumentError: images of another number of channels or dtype, scores that are not finite, an unknown score,
                or a given alpha that needs more calibration normals than there are.
        """
        require(isinstance(images, Tensor), "images", "a tensor [B, C, H, W]", type(images).__name__)
        channels = self.model.mean.shape[0]
        right = images.dim() == 4 and images.shape[1] == channels
        require(right, "images", lambda: f"[B, {channels}, H, W], as it was fitted to", images)
        size = (images.shape[2], images.shape[3])
        model_size = self.model.encoder.image_size
        if images.dtype == torch.uint8:
            images = resize(images, model_size)
        else:
            require(images.is_floating_point(), "images", "uint8, or float in [0, 1]", images.dtype)
            if size != model_size:
                images = nn.functional.interpolate(images, model_size, mode="bilinear", antialias=True)
        found = self.scorer.of_queries(self.model.queries(self.model(images.to(self.model.device))), size)
        scores = self.scores_of(found)
        if values_are_free(scores["plain"]):
            require_finite(scores)
        by = by or self.lead
        require_choice(by, "by", self.names)
        possible = alpha is not None or self.calibration.count >= normals_needed(self.alpha)
        verdicts = self.calibration.anomalous(by, scores[by], alpha or self.alpha) if possible else None
        return Verdicts(scores, self.calibration.p_values(by, scores[by]), verdicts, found.maps)

    def scores_of(self, found: FilledScores) -> dict[str, Tensor]:
        """All scores [B], that of the labels among them."""
        if self.labels is None:
            return found.scores
        return {**found.scores, LABELLED: self.labels(found.pooled, found.scores[self.scorer.lead])}

    def over(self, images: Images, alpha: float | None = None) -> Verdicts:
        """`forward` over a whole set, in batches; on the CPU."""
        order, images = torch.arange(len(images)), images.to(self.model.device)
        parts = [self(batch, alpha) for batch, _ in images.batches(order, self.batch_size)]
        verdicts = [part.verdicts for part in parts if part.verdicts is not None]
        return Verdicts(
            {name: torch.cat([p.scores[name] for p in parts]).cpu() for name in parts[0].scores},
            torch.cat([part.p_values for part in parts]).cpu(),
            torch.cat(verdicts).cpu() if verdicts else None,
            {name: torch.cat([p.maps[name] for p in parts]).cpu() for name in parts[0].maps},
        )


class EncodedImages:
    """The queries of images at all scales, encoded once; any rows of them in batches.

    Args:
        model: put into eval mode.
        images: on any device.
        batch_size: images per forward pass.
        at_most: bytes to hold; beyond them images are encoded again each time.
    """

    def __init__(self, model: AnoMem, images: Images, batch_size: int, at_most: int = HELD_BYTES) -> None:
        self.model, self.images, self.batch_size = model.eval(), images.to(model.device), batch_size
        per_image = sum(h * w * d * 4 for (h, w), d in zip(model.encoder.sizes, model.features, strict=True))
        self.held: list[Tensor] | None = None
        if per_image * len(images) <= at_most:
            parts = list(self._encoded(torch.arange(len(images))))
            self.held = [torch.cat(of_scale) for of_scale in zip(*parts, strict=True)] if parts else []

    @torch.no_grad()
    def _encoded(self, rows: Tensor) -> Iterator[list[Tensor]]:
        for batch, _ in self.images.batches(rows, self.batch_size):
            yield [query.float() for query in self.model.queries(self.model(batch))]

    def rows(self, rows: Tensor) -> _Rows:
        """The images of some rows [n] int64, which may be iterated several times."""
        return _Rows(self, rows)


class _Rows:
    """Yields batches of S tensors [b, P_s, d_s]."""

    def __init__(self, encoded: EncodedImages, rows: Tensor) -> None:
        self.encoded, self.order = encoded, rows

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        held = self.encoded.held
        if held is None:
            yield from self.encoded._encoded(self.order)
        else:
            for part in self.order.split(self.encoded.batch_size):
                yield [of_scale[part.to(of_scale.device)] for of_scale in held]


class FitReport(NamedTuple):
    """What `fit_detector` did."""

    filled: list[FilledScale]
    """Of the detector that scores new images."""
    alignment: Alignment
    """Of its Gaussians."""
    normals: int
    """Normal images seen."""
    fitted: int
    """Of them, those that the detector was fitted to."""
    defects: int
    """Labelled ones."""


def fit_detector(
    model: AnoMem,
    images: Images,
    is_normal: Tensor,
    *,
    aligned: bool,
    config: FillConfig,
    alpha: float = 0.01,
    seed: int = 0,
) -> tuple[FittedDetector, FitReport]:
    """Fill a model's memories from normals, fit the scores, and calibrate the decision with normals left out.

    Args:
        model: its encoder is left as it is.
        images: normals, and labelled defects if there are any.
        is_normal: [N] bool.
        aligned: whether a position means the same in every image.
        config: of filling and scores.
        alpha: false-alarm rate of the verdict.
        seed: of the choice of prototypes and of the calibration normals.

    Raises:
        ArgumentError: fewer than three normals.
        UserError: labelled defects, and scikit-learn is not installed.
    """
    is_normal = is_normal.cpu()
    normals, defects = is_normal.nonzero().flatten(), (~is_normal).nonzero().flatten()
    require(
        len(normals) >= FEWEST, "images", f"at least {FEWEST} normals: two to fit and one to calibrate", len(normals)
    )
    encoded = EncodedImages(model, images, config.batch_size)
    alignment: Alignment = "per_position" if aligned and _gaussian_bytes(model) <= GAUSSIAN_BYTES else "pooled"
    held, folds = hold_out(len(normals), alpha, seed)
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def fitted(rows: Tensor) -> tuple[FittedDetector, list[FilledScale]]:
        queries = encoded.rows(rows)
        filled = fill_memories(model, queries, config.prototypes, config.method, seed=seed)
        scorer = FilledScorer(model, alignment, config.top_fraction, config.top_k)
        scorer.fit(queries)
        labels = None
        if len(defects):
            both = torch.cat([rows, defects])
            scored = [scorer.of_queries(q, (1, 1)) for q in encoded.rows(both)]
            pooled = torch.cat([s.pooled for s in scored]).cpu()
            labels = FewLabels(pooled.shape[1])
            one_class = torch.cat([s.scores[scorer.lead] for s in scored]).cpu()
            labels.fit(pooled, one_class, torch.arange(len(both)) < len(rows), seed)
            labels.to(model.device)
        unused = Calibration({scorer.lead: torch.zeros(1)})
        return FittedDetector(scorer, unused, alpha, labels, config.batch_size), filled

    def calibrate(detector: FittedDetector, fold: Fold) -> None:
        for queries in encoded.rows(normals[fold.calibrate]):
            found = detector.scorer.of_queries(queries, model.encoder.image_size)
            maxima = {name: m.amax(dim=(1, 2)).cpu() for name, m in found.maps.items()}
            parts.append(({name: s.cpu() for name, s in detector.scores_of(found).items()}, maxima))

    for fold in folds:
        detector, filled = fitted(normals[fold.fit])
        calibrate(detector, fold)
    rows = normals[folds[0].fit] if held == "split" else normals
    if held == "cross":
        detector, filled = fitted(rows)
    scores, maxima = ({name: torch.cat([p[i][name] for p in parts]) for name in parts[0][i]} for i in (0, 1))
    detector.calibration = Calibration(scores, maxima, held)
    return detector, FitReport(filled, alignment, len(normals), len(rows), len(defects))


def restored_detector(
    model: AnoMem, tensors: Mapping[str, Tensor], about: Mapping[str, Any], config: FillConfig, alpha: float
) -> FittedDetector:
    """A detector of the right shapes around a fresh model; its tensors are still to be loaded.

    Args:
        model: with the configuration of the one that was fitted.
        tensors: `stored(detector)`.
        about: values stored beside the tensors: "alignment", "calibration".
        config: the detector was fitted with.
        alpha: false-alarm rate of the verdict.

    Raises:
        KeyError: a tensor or a value is missing.
    """
    for s, memory in enumerate(model.memories):
        stored = tensors[f"detector.scorer.model.memories.{s}.prototypes"]
        memory.prototypes = nn.Parameter(torch.zeros_like(stored, device=model.device), requires_grad=False)
    scorer = FilledScorer(model, about["alignment"], config.top_fraction, config.top_k)
    labels = None
    if "detector.labels.weight" in tensors:
        labels = FewLabels(len(tensors["detector.labels.weight"]) - 1).to(model.device)
    prefix = "calibration."
    of_calibration = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    calibration = Calibration.restored(of_calibration, about["calibration"])
    return FittedDetector(scorer, calibration, alpha, labels, config.batch_size)


def stored(detector: FittedDetector) -> dict[str, Tensor]:
    """All tensors of a detector by name: "detector." its state, "calibration." the scores of held-out normals."""
    tensors = {f"detector.{key}": x for key, x in detector.state_dict().items()}
    return tensors | {f"calibration.{key}": x for key, x in detector.calibration.tensors().items()}


def _gaussian_bytes(model: AnoMem) -> int:
    """Of the float64 sums of one Gaussian per position, of both halves and together."""
    return 24 * sum(h * w * d**2 for (h, w), d in zip(model.encoder.sizes, model.features, strict=True))
