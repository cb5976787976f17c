"""Scorer: a trained model with its fitted prior and detector gives scores and maps of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from anomem.augment import Augmentation, AugmentConfig
from anomem.data import Images
from anomem.errors import enough_memory
from anomem.models import AnoMem, DeviationHead
from anomem.reference.deviation_map import Distance
from anomem.scoring.config import Pool, ScoreConfig
from anomem.scoring.detector import Alignment, DeviationDetector
from anomem.scoring.prior import LocationPrior
from anomem.validation import require, require_choice, require_pixels, values_are_free

SAME = 1e-6
"""Relative difference up to which the scores of different images count as the same."""


class Scored(NamedTuple):
    """Scores and maps of B images; higher is more anomalous."""

    scores: dict[str, Tensor]
    """Name -> [B]. "plain", "prior", "energy", "detector" and, after stage 2, "stage2"; see `Scorer`."""
    maps: dict[str, Tensor]
    """"plain" and "detector" -> [B, H, W], at the images' size."""


class Scorer(nn.Module):
    """A frozen model with the prior and the detector that were fitted to it.

    Scores: "plain" is Σ lambda_s pool dev(z, HF(z)); "prior" the same with the location prior; "energy" is
    Σ lambda_s mean −lse/beta; "detector" the Gaussians on the deviations; "stage2" Σ lambda_s |g(s)|.

    Args:
        model: encoder and memories.
        alignment: of the detector.
        config: of the plain deviation.
        head: of stage 2, or None.

    Shape:
        images [B, C, H, W] -> scores [B] each, maps [B, H, W] each.

    Example:
        >>> scorer = load_scorer(Path("runs/mine"))
        >>> scored = scorer(images)
        >>> scored.scores["detector"], scored.maps["detector"]  # [B], [B, H, W]
    """

    def __init__(
        self, model: AnoMem, alignment: Alignment, config: ScoreConfig, head: DeviationHead | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.head = head
        positions = [height * width for height, width in model.encoder.sizes]
        self.prior = LocationPrior(positions, [memory.prototypes.shape[0] for memory in model.memories])
        self.detector = DeviationDetector(positions, model.features, alignment, config.detector_megabytes)
        self.to(model.device)
        self.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its scores."""
        return ("plain", "prior", "energy", "detector", *(() if self.head is None else ("stage2",)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Scored:
        """Scores and maps of images [B, C, H, W], uint8 or float in [0, 1], of the training size.

        Raises:
            ArgumentError: images of another shape or dtype; on a CPU also values outside of [0, 1], and scores that
                are not finite.
            UserError: out of memory.
        """
        self._check(images)
        with enough_memory("score.batch_size"):
            scored = self.unchecked(images)
        if values_are_free(scored.scores["plain"]):
            require_finite(scored.scores)
        return scored

    @torch.no_grad()
    def unchecked(self, images: Tensor) -> Scored:
        """As `forward`, without a look at the images and at the scores."""
        maps = self.model(images)
        deviations = self.model.deviations(maps)
        plain = self.model.distances(maps, self.config.distance)
        scores = {
            "plain": self.pooled(plain),
            "prior": self.pooled(self.model.distances(maps, self.config.distance, self.prior.log_priors)),
            "energy": self.weighted(
                [m.energy(q).mean(dim=1) for m, q in zip(self.model.memories, self.model.queries(maps), strict=True)]
            ),
            "detector": self.detector(deviations),
        }
        if self.head is not None:
            scores["stage2"] = self.head(deviations)
        size = (images.shape[2], images.shape[3])
        distances = [d.view_as(p) for d, p in zip(self.detector.maps(deviations), plain, strict=True)]
        localised = {"plain": self.upsampled(plain, size), "detector": self.upsampled(distances, size)}
        return Scored({name: value.float() for name, value in scores.items()}, localised)

    def _check(self, images: Tensor) -> None:
        require(isinstance(images, Tensor), "images", "a tensor [B, C, H, W]", type(images).__name__)
        shape = (self.model.mean.shape[0], *self.model.encoder.image_size)
        right = images.dim() == 4 and images.shape[1:] == shape
        require(right, "images", lambda: f"[B, {', '.join(map(str, shape))}], as it was trained", images)
        require_pixels(images, "images")

    def pooled(self, distances: list[Tensor], pool: Pool | None = None) -> Tensor:
        """Σ lambda_s pool over positions: S tensors [B, H_s, W_s] -> [B].

        Args:
            distances: of every scale.
            pool: "mean", "max" or "topk"; the configured one when None.
        """
        pool = self.config.pool if pool is None else pool
        require_choice(pool, "pool", get_args(Pool))
        return self.weighted([_pool(d.flatten(1), pool, self.config.top_fraction) for d in distances])

    def weighted(self, per_scale: list[Tensor]) -> Tensor:
        """Σ lambda_s x_s: S tensors [...] -> [...]."""
        return torch.stack([w * x for w, x in zip(self.model.scale_weights, per_scale, strict=True)]).sum(dim=0)

    def upsampled(self, per_scale: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps brought to the image's size, combined with lambda_s: S tensors [B, H_s, W_s] -> [B, H, W]."""
        resized = [
            nn.functional.interpolate(x[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
            for x in per_scale
        ]
        return self.weighted(resized)


def require_finite(scores: Mapping[str, Tensor]) -> None:
    """Check that every score is a number.

    Raises:
        ArgumentError: NaN or infinity; the message names the score.
    """
    for name, values in scores.items():
        bad = int((~values.isfinite()).sum())
        require(
            bad == 0,
            f"scores[{name!r}]",
            "finite numbers",
            lambda bad=bad, values=values: f"{bad} of {len(values)} NaN or infinite",
            "the model has diverged: train it with a lower learning rate",
        )


def useless_scores(scorer: Scorer, images: Images, at_most: int) -> str:
    """What is wrong with the scores of the training images: some are not finite, or all are the same.

    Scores of one or two different images may well be equal and are not judged.

    Args:
        scorer: fitted.
        images: training images, on the scorer's device.
        at_most: largest number of images to score, evenly spaced.

    Returns:
        "not finite (plain, detector)", or "" where nothing is wrong.
    """
    order = torch.linspace(0, len(images) - 1, min(len(images), at_most)).round().long()
    parts: list[dict[str, Tensor]] = []
    different: set[bytes] = set()
    for batch, _ in images.batches(order, scorer.config.batch_size):
        parts.append(scorer.unchecked(batch).scores)
        for image in batch.cpu():
            if len(different) < 3:
                different.add(image.numpy().tobytes())
    wrong: dict[str, list[str]] = {}
    for name in scorer.names:
        values = torch.cat([part[name] for part in parts]).double().cpu()
        # A cosine is rounded in units of 1, however small the deviation.
        unit = 1.0 if name in ("plain", "prior") and scorer.config.distance == "cosine" else 0.0
        if not bool(values.isfinite().all()):
            wrong.setdefault("not finite", []).append(name)
        elif len(different) > 2 and float(values.max() - values.min()) <= SAME * max(unit, float(values.abs().max())):
            wrong.setdefault("all the same", []).append(name)
    return "; ".join(f"{fault} ({', '.join(names)})" for fault, names in wrong.items())


def alignment_of(config: ScoreConfig, aligned: bool) -> Alignment:
    """The detector's alignment: as configured, or by whether positions are comparable across images."""
    automatic: Alignment = "per_position" if aligned else "pooled"
    return automatic if config.alignment == "auto" else config.alignment


def fit_scorer(
    model: AnoMem,
    images: Images,
    is_normal: Tensor,
    *,
    aligned: bool,
    augment: AugmentConfig,
    config: ScoreConfig,
    head: DeviationHead | None = None,
) -> Scorer:
    """Fit prior and detector to the training normals; anomalies are not used.

    Args:
        model: trained; put into eval mode.
        images: training images, on the model's device.
        is_normal: [N] bool.
        aligned: whether positions are comparable across images; used where `config.alignment` is "auto".
        augment: training augmentations; the copies get weaker ones derived from them.
        config: of the scorer.
        head: of stage 2, or None.
    """
    model.eval()
    scorer = Scorer(model, alignment_of(config, aligned), config, head)
    batches = normal_batches(images, is_normal, augment, config)
    scorer.prior.fit(model, (model.queries(model(x)) for x in batches(0)))
    scorer.detector.fit(lambda: (model.deviations(model(x)) for x in batches(config.copies)))
    return scorer


def fit_feature_detector(
    model: AnoMem, images: Images, is_normal: Tensor, alignment: Alignment, augment: AugmentConfig, config: ScoreConfig
) -> DeviationDetector:
    """The control without memory: the same detector on the features z instead of z − HF(z).

    Args:
        model: trained, in eval mode.
        images: training images, on the model's device.
        is_normal: [N] bool.
        alignment: "per_position" or "pooled".
        augment: as for `fit_scorer`.
        config: as for `fit_scorer`.
    """
    batches = normal_batches(images, is_normal, augment, config)
    positions = [height * width for height, width in model.encoder.sizes]
    detector = DeviationDetector(positions, model.features, alignment, config.detector_megabytes).to(model.device)
    detector.fit(lambda: (model.queries(model(x)) for x in batches(config.copies)))
    return detector


def normal_batches(
    images: Images, is_normal: Tensor, augment: AugmentConfig, config: ScoreConfig
) -> Callable[[int], Iterator[Tensor]]:
    """The training normals and lightly augmented copies of them; every call gives the same batches.

    Args:
        images: training images.
        is_normal: [N] bool.
        augment: training augmentations; the light ones are derived from them.
        config: batch size and seed.

    Returns:
        A function from the number of copies to batches [b, C, H, W] in [0, 1].
    """
    normals = is_normal.nonzero().flatten()
    light = Augmentation(light_augmentation(augment))

    @torch.no_grad()
    def batches(copies: int) -> Iterator[Tensor]:
        generator: torch.Generator | None = None
        for copy in range(copies + 1):
            for batch, _ in images.batches(normals, config.batch_size):
                if generator is None:
                    generator = torch.Generator(batch.device).manual_seed(config.seed)
                yield light(batch, generator) if copy else batch.float() / 255

    return batches


def light_augmentation(config: AugmentConfig) -> AugmentConfig:
    """A third of the training augmentations' ranges, without flips and blur: variation that normals have.

    Args:
        config: of the training.
    """

    def towards_one(interval: tuple[float, float]) -> tuple[float, float]:
        return (1 + (interval[0] - 1) / 3, 1 + (interval[1] - 1) / 3)

    return AugmentConfig(
        crop_area=towards_one(config.crop_area),
        crop_ratio=towards_one(config.crop_ratio),
        flip=0.0,
        zoom=towards_one(config.zoom),
        rotation=config.rotation / 3,
        shift=config.shift / 3,
        padding=config.padding,
        brightness=config.brightness / 3,
        contrast=config.contrast / 3,
        saturation=config.saturation / 3,
        jitter=config.jitter,
        blur=0.0,
        noise=config.noise / 3,
    )


def score_images(scorer: Scorer, images: Images) -> Scored:
    """Scores and maps of a whole set, on the CPU.

    Args:
        scorer: fitted.
        images: on any device.

    Raises:
        ArgumentError: a score is not finite.
    """
    order, images = torch.arange(len(images)), images.to(scorer.model.device)
    parts = [scorer(batch) for batch, _ in images.batches(order, scorer.config.batch_size)]
    scores = {name: torch.cat([p.scores[name] for p in parts]).cpu() for name in parts[0].scores}
    require_finite(scores)
    return Scored(
        scores,
        {name: torch.cat([p.maps[name] for p in parts]).cpu() for name in parts[0].maps},
    )


@torch.no_grad()
def plain_variants(scorer: Scorer, images: Images) -> dict[str, Tensor]:
    """Every distance with every pooling, for the table: "plain/l2-max" -> [T], on the CPU.

    Args:
        scorer: fitted.
        images: on the scorer's device.
    """
    parts: dict[str, list[Tensor]] = {}
    for batch, _ in images.batches(torch.arange(len(images)), scorer.config.batch_size):
        maps = scorer.model(batch)
        for distance in get_args(Distance):
            per_scale = scorer.model.distances(maps, distance)
            for pool in get_args(Pool):
                parts.setdefault(f"plain/{distance}-{pool}", []).append(scorer.pooled(per_scale, pool).cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _pool(distances: Tensor, pool: Pool, top_fraction: float) -> Tensor:
    """[B, P] -> [B]."""
    if pool == "mean":
        return distances.mean(dim=1)
    if pool == "max":
        return distances.amax(dim=1)
    count = max(1, int(distances.shape[1] * top_fraction))
    return distances.topk(count, dim=1).values.mean(dim=1)
