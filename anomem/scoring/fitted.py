"""A fitted detector: filled memories, what was fitted to their deviations, and the calibration of its decision."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anomem.augment import Augmentation, AugmentConfig
from anomem.data import Images
from anomem.data.frame import framed, unframed
from anomem.models import AnoMem, TiledEncoder
from anomem.scoring.config import FillConfig
from anomem.scoring.decision import Calibration, check_alpha, hold_out, normals_needed
from anomem.scoring.detector import Alignment
from anomem.scoring.filled import HELD_BYTES, PARTS, FilledScale, FilledScorer, FilledScores, fill_memories
from anomem.scoring.labelled import FewLabels
from anomem.scoring.scorer import require_finite
from anomem.validation import require, require_choice, require_pixels, values_are_free

MAPS = ("plain", "local")
UNITS = "feature"
"""Of the deviations that a stored detector was fitted to; see `FilledScorer`."""
LABELLED = "labelled"
"""Name of the score that joins the labelled defects with the one-class score."""
FEW, ROWS = 8, 16
"""Fewer normals than the first are fitted with light copies of them, up to the second in all."""
LIGHT = replace(AugmentConfig.light(), shift=0.02, rotation=2.0)
PIXELS_AT_ONCE = 2**22
"""Of a batch: fewer images are encoded at once where they are large."""
CROSS_PART = 0.5
"""Of the features: prototypes at most where every normal is fitted and calibrates (cross-fitted)."""
FITTED_TOO = "their scores are lower than those of new normals, so that the verdict would give more false alarms"
BOTH = "an image is normal or has a defect: take it out of one of the two folders"
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
        letterbox: whether images of another aspect ratio keep it; see `anomem.data.frame`.

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
        letterbox: bool = False,
    ) -> None:
        super().__init__()
        check_alpha(alpha)
        self.letterbox = letterbox
        self.scorer, self.calibration, self.alpha = scorer, calibration, alpha
        self.batch_size = at_once(scorer.model, batch_size)
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
        require_pixels(images, "images")
        dtype = images.dtype if images.dtype == torch.uint8 else self.model.mean.dtype
        images = framed(images.to(self.model.device, dtype), self.model.encoder.image_size, self.letterbox)
        return self.of_queries(self.model.queries(self.model(images)), size, alpha, by)

    @torch.no_grad()
    def of_queries(
        self, queries: Sequence[Tensor], size: tuple[int, int], alpha: float | None = None, by: str | None = None
    ) -> Verdicts:
        """`forward` of images that are encoded already.

        Args:
            queries: S tensors [B, P_s, d_s].
            size: (H, W) of the maps.
            alpha: as `forward`.
            by: as `forward`.
        """
        frame = self.model.encoder.image_size if self.letterbox else size
        found = self.scorer.of_queries(queries, frame, pooled=self.labels is not None)
        scores = self.scores_of(found)
        if values_are_free(scores["plain"]):
            require_finite(scores)
        by = by or self.lead
        require_choice(by, "by", self.names)
        possible = alpha is not None or self.calibration.count >= normals_needed(self.alpha)
        alpha = self.alpha if alpha is None else alpha
        verdicts = self.calibration.anomalous(by, scores[by], alpha) if possible else None
        maps = {name: unframed(m, size, self.letterbox) for name, m in found.maps.items()}
        return Verdicts(scores, self.calibration.p_values(by, scores[by]), verdicts, maps)

    def scores_of(self, found: FilledScores) -> dict[str, Tensor]:
        """All scores [B], that of the labels among them."""
        if self.labels is None:
            return found.scores
        assert found.pooled is not None
        return {**found.scores, LABELLED: self.labels(found.pooled, found.scores[self.scorer.lead])}

    def over(self, images: Images, alpha: float | None = None, maps: bool = True) -> Verdicts:
        """`forward` over a whole set, in batches; on the CPU.

        Args:
            images: of the size that was fitted.
            alpha: as `forward`.
            maps: keep the maps of all images, which are as large as the images.
        """
        order, images = torch.arange(len(images)), images.to(self.model.device)
        parts = []
        for batch, _ in images.batches(order, self.batch_size):
            found = self(batch, alpha)
            parts.append(found if maps else found._replace(maps={}))
        return joined(parts)


def joined(parts: Sequence[Verdicts]) -> Verdicts:
    """The verdicts of several batches as those of one set, on the CPU."""
    verdicts = [part.verdicts for part in parts if part.verdicts is not None]
    return Verdicts(
        {name: torch.cat([p.scores[name] for p in parts]).cpu() for name in parts[0].scores},
        torch.cat([part.p_values for part in parts]).cpu(),
        torch.cat(verdicts).cpu() if verdicts else None,
        {name: torch.cat([p.maps[name] for p in parts]).cpu() for name in parts[0].maps},
    )


def at_once(model: AnoMem, batch_size: int) -> int:
    """Images of the model's size in one batch: what was asked for, less where `PIXELS_AT_ONCE` would be exceeded."""
    height, width = model.encoder.image_size
    return max(1, min(batch_size, PIXELS_AT_ONCE // (height * width)))


class EncodedImages:
    """The queries of images at all scales, encoded once; any rows of them in batches.

    Args:
        model: put into eval mode.
        images: on any device.
        batch_size: images per forward pass.
        at_most: bytes to hold, 1 GiB by default; beyond them images are encoded again each time.
    """

    def __init__(self, model: AnoMem, images: Images, batch_size: int, at_most: int | None = None) -> None:
        self.model, self.images = model.eval(), images.to(model.device)
        self.batch_size = at_once(model, batch_size)
        self.order = torch.arange(len(images))
        per_image = sum(h * w * d * 4 for (h, w), d in zip(model.encoder.sizes, model.features, strict=True))
        self.held: list[Tensor] | None = None
        if per_image * len(images) <= (HELD_BYTES if at_most is None else at_most):
            parts = list(self._encoded(self.order))
            self.held = [torch.cat(of_scale) for of_scale in zip(*parts, strict=True)] if parts else []

    def __len__(self) -> int:
        return len(self.order)

    @torch.no_grad()
    def _encoded(self, rows: Tensor) -> Iterator[list[Tensor]]:
        for batch, _ in self.images.batches(rows, self.batch_size):
            yield [query.float() for query in self.model.queries(self.model(batch))]

    def part(self, rows: Tensor) -> EncodedImages:
        """Some of the images [n] int64 as a set of their own; nothing is encoded or copied."""
        found = copy.copy(self)
        found.order = self.order[rows]
        return found

    def rows(self, rows: Tensor | None = None) -> _Rows:
        """The images of some rows [n] int64, or all, which may be iterated several times."""
        return _Rows(self, self.order if rows is None else self.order[rows])

    def digests(self) -> list[bytes]:
        """Of the pixels of each image: equal images have equal ones."""
        found = []
        for batch, _ in self.images.batches(self.order, self.batch_size):
            found += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in batch.cpu()]
        return found

    @torch.no_grad()
    def with_copies(self, rows: Tensor, count: int, seed: int) -> list[Sequence[Tensor]]:
        """Some images and light copies of them, `count` or a few more in all.

        Args:
            rows: [n] int64.
            count: of images and copies.
            seed: of the copies.
        """
        found: list[Sequence[Tensor]] = list(self.rows(rows))
        augmentation = Augmentation(LIGHT)
        generator: torch.Generator | None = None
        for _ in range(-(-count // len(rows)) - 1):
            for batch, _ in self.images.batches(self.order[rows], self.batch_size):
                generator = generator or torch.Generator(batch.device).manual_seed(seed)
                maps = self.model(augmentation(batch, generator))
                found.append([query.float() for query in self.model.queries(maps)])
        return found


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
    """Normal images seen, each once."""
    fitted: int
    """Of them, those that the detector was fitted to."""
    defects: int
    """Labelled ones."""
    duplicates: int
    """Normal images that were left out because they equal another one."""
    copies: int
    """Light copies that were fitted besides."""


def fit_detector(
    model: AnoMem,
    images: Images | EncodedImages,
    is_normal: Tensor,
    *,
    aligned: bool,
    config: FillConfig,
    alpha: float = 0.01,
    seed: int = 0,
    calibration: Images | EncodedImages | None = None,
    letterbox: bool = False,
) -> tuple[FittedDetector, FitReport]:
    """Fill a model's memories from normals, fit the scores, and calibrate the decision with normals left out.

    A normal image that equals another one counts once: it could be fitted and calibrate as well.

    Args:
        model: its encoder is left as it is.
        images: normals, and labelled defects if there are any; encoded by this model already, or not.
        is_normal: [N] bool.
        aligned: whether a position means the same in every image.
        config: of filling and scores.
        alpha: false-alarm rate of the verdict.
        seed: of the choice of prototypes and of the calibration normals.
        calibration: other normals, which calibrate; all of `images` are fitted then.
        letterbox: see `FittedDetector`.

    Raises:
        ArgumentError: no normal, fewer than three beside labelled defects, or an image that calibrates or has a defect
            equals a normal one.
        UserError: labelled defects, and scikit-learn is not installed.
    """
    is_normal = is_normal.cpu()
    encoded = _encoded(model, images, config, "images")
    given, defects = is_normal.nonzero().flatten(), (~is_normal).nonzero().flatten()
    digests = encoded.part(given).digests()
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    normals = given[sorted(first.values())]
    least = 3 if len(defects) else 1
    reason = "two to fit beside the labelled defects, one to calibrate" if len(defects) else None
    require(len(normals) >= least, "images", f"at least {least} different normals", len(normals), reason)
    if len(defects):
        _require_apart(digests, encoded.part(defects).digests(), "labels", BOTH)
    alignment: Alignment = "per_position" if aligned and _gaussian_bytes(model) <= GAUSSIAN_BYTES else "pooled"
    calibrating = None if calibration is None else _encoded(model, calibration, config, "calibration")
    if calibrating is not None:
        _require_apart(digests, calibrating.digests(), "calibration", FITTED_TOO)
    held, folds = ("split", []) if calibrating is not None else hold_out(len(normals), alpha, seed)
    rows = normals[folds[0].fit] if folds and held == "split" else normals
    few = min([len(rows), *(len(fold.fit) for fold in folds)]) < FEW
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def fitted(
        rows: Tensor,
        like: FilledScorer | None = None,
        by: Mapping[str, Tensor] | None = None,
        labelled: bool = True,
    ) -> tuple[FittedDetector, list[FilledScale]]:
        """`like` gives the spreads of the scales; `by`, scores of normals left out, those of the joined scores."""
        queries: Iterable[Sequence[Tensor]] = encoded.rows(rows)
        if few:
            queries = encoded.with_copies(rows, ROWS, seed)
        # A memory of nearly all features leaves the Gaussians no deviation to be fitted to.
        part = CROSS_PART if held == "cross" and folds else 1.0
        filled = fill_memories(model, queries, config.prototypes, config.method, seed=seed, part=part)
        scorer = FilledScorer(model, alignment, config.top_fraction * _tile_share(model), config.top_k)
        scorer.fit(queries)
        if like is not None:
            scorer.spreads_from(like)
        if by is not None:
            scorer.measure_by(by)
        labels = None
        if len(defects) and labelled:
            both = torch.cat([rows, defects])
            scored = [scorer.of_queries(q, (1, 1), pooled=True) for q in encoded.rows(both)]
            pooled = torch.cat([s.pooled for s in scored if s.pooled is not None]).cpu()
            labels = FewLabels(pooled.shape[1])
            one_class = torch.cat([s.scores[scorer.lead] for s in scored]).cpu()
            labels.fit(pooled, one_class, torch.arange(len(both)) < len(rows), seed)
            labels.to(model.device)
        unused = Calibration({scorer.lead: torch.zeros(0)})
        return FittedDetector(scorer, unused, alpha, labels, config.batch_size, letterbox), filled

    def calibrate(detector: FittedDetector, normals_left_out: EncodedImages) -> None:
        for queries in normals_left_out.rows():
            found = detector.scorer.of_queries(queries, model.encoder.image_size, pooled=detector.labels is not None)
            maxima = {name: m.amax(dim=(1, 2)).cpu() for name, m in found.maps.items()}
            parts.append(({name: s.cpu() for name, s in detector.scores_of(found).items()}, maxima))

    by: dict[str, Tensor] | None = None
    if held == "cross" and folds:
        # Spreads differ from fit to fit, the fewer images the more so: scores of all fits are compared in common ones.
        whole = fitted(normals, labelled=False)[0].scorer
        for fold in folds:
            one = fitted(normals[fold.fit], whole, labelled=False)[0]
            calibrate(one, encoded.part(normals[fold.calibrate]))
        by = {name: torch.cat([scores[name] for scores, _ in parts]) for name in PARTS}
        if len(defects):
            parts.clear()
            for fold in folds:
                calibrate(fitted(normals[fold.fit], whole, by)[0], encoded.part(normals[fold.calibrate]))
    detector, filled = fitted(rows, by=by)
    if calibrating is not None:
        calibrate(detector, calibrating)
    elif held == "split":
        calibrate(detector, encoded.part(normals[folds[0].calibrate]))
    elif by is not None and not len(defects):
        parts = [(detector.scorer.joined(scores), maxima) for scores, maxima in parts]
    names = (detector.names, MAPS)
    scores, maxima = (
        {name: torch.cat([torch.zeros(0), *(part[i][name] for part in parts)]) for name in names[i]} for i in (0, 1)
    )
    detector.calibration = Calibration(scores, maxima, held)
    copies = -(-ROWS // len(rows)) * len(rows) - len(rows) if few else 0
    report = FitReport(filled, alignment, len(normals), len(rows), len(defects), len(given) - len(normals), copies)
    return detector, report


def _encoded(model: AnoMem, images: Images | EncodedImages, config: FillConfig, argument: str) -> EncodedImages:
    if isinstance(images, EncodedImages):
        return images
    channels = model.mean.shape[0]
    require(images.channels == channels, argument, f"images of {channels} channels, as the model's", images.channels)
    return EncodedImages(model, images, config.batch_size)


def _require_apart(fitted: Sequence[bytes], others: Sequence[bytes], argument: str, why: str) -> None:
    """Raise `ArgumentError` where an image that calibrates, or is labelled as a defect, is fitted as a normal too."""
    both = set(fitted)
    common = sum(digest in both for digest in others)
    received = f"{common} of {len(others)} that equal fitted ones"
    require(common == 0, argument, "images that are not fitted as normals", received, why)


def _tile_share(model: AnoMem) -> float:
    """Part of an image whose positions are pooled: a tile's, so that a defect is not lost in a large image."""
    return model.encoder.share if isinstance(model.encoder, TiledEncoder) else 1.0


def restored_detector(
    model: AnoMem,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    config: FillConfig,
    alpha: float,
    letterbox: bool,
) -> FittedDetector:
    """A detector of the right shapes around a fresh model; its tensors are still to be loaded.

    Args:
        model: with the configuration of the one that was fitted.
        tensors: `stored(detector)`.
        about: values stored beside the tensors: "alignment", "calibration", "units".
        config: the detector was fitted with.
        alpha: false-alarm rate of the verdict.
        letterbox: see `FittedDetector`.

    Raises:
        KeyError: a tensor or a value is missing.
        ValueError: an earlier version fitted it, to normalised deviations.
    """
    if about.get("units") != UNITS:
        raise ValueError("an earlier version fitted it, to normalised deviations")
    for s, memory in enumerate(model.memories):
        stored = tensors[f"detector.scorer.model.memories.{s}.prototypes"]
        memory.prototypes = nn.Parameter(torch.zeros_like(stored, device=model.device), requires_grad=False)
    scorer = FilledScorer(model, about["alignment"], config.top_fraction * _tile_share(model), config.top_k)
    labels = None
    if "detector.labels.weight" in tensors:
        labels = FewLabels(len(tensors["detector.labels.weight"]) - 1).to(model.device)
    prefix = "calibration."
    of_calibration = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    calibration = Calibration.restored(of_calibration, about["calibration"])
    return FittedDetector(scorer, calibration, alpha, labels, config.batch_size, letterbox)


def stored(detector: FittedDetector) -> dict[str, Tensor]:
    """All tensors of a detector by name: "detector." its state, "calibration." the scores of held-out normals."""
    tensors = {f"detector.{key}": x for key, x in detector.state_dict().items()}
    return tensors | {f"calibration.{key}": x for key, x in detector.calibration.tensors().items()}


def _gaussian_bytes(model: AnoMem) -> int:
    """Of the float64 sums of one Gaussian per position, of both halves and together."""
    return 24 * sum(h * w * d**2 for (h, w), d in zip(model.encoder.sizes, model.features, strict=True))
