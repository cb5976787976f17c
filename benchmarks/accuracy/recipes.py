"""Recipes that learn the memories of a frozen encoder on solar cells, each by one loss on features held in memory.

A recipe sees normal cells only: their features, those of light copies, and those of synthetic outliers made from them.
The encoder is that of `benchmarks.accuracy.cells`; all recipes of a size start and end with as many prototypes.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from anomem import functional as AF
from anomem.augment import Augmentation, synthesize_outliers
from anomem.data import DataConfig
from anomem.data.elpv import Split, split_cells
from anomem.evaluate.metrics import auroc
from anomem.models import AnoMem
from anomem.nn import ContrastedMemoryLoss, HopfieldMemory
from anomem.reference.contrast import Negatives
from anomem.reference.retrieve import normalize_rows
from anomem.scoring.fill import Fill, fill_prototypes
from anomem.scoring.filled import TOP_K, TOP_PART
from anomem.scoring.fitted import LIGHT
from anomem.train import FitConfig
from anomem.train.fitting import model_to_fit, resolved
from benchmarks.accuracy.cells import SIDE, Cut, cells_of, task_of

Loss = Literal["none", "contrast", "read", "worst", "outliers", "scores"]
Outlier = Literal["noise", "mixed", "beyond", "other", "images"]
COPIES = 2
"""Light copies and synthetic outliers held of each normal cell."""
WARMUP = 10
FALSE = 0.8
"""Cosine above which a negative counts as false."""


@dataclass(frozen=True)
class Recipe:
    """How the memories are started and what their gradient steps minimise.

    * "contrast": the loss of stage 1, between features and what the memory returns for the other copy of the image.
    * "read": the mean cosine deviation of normals. "worst": the mean over the largest tenth of a batch.
    * "outliers": softplus((dev(normal) − dev(outlier)) / spread), mean over pairs of a batch; a surrogate of 1 − AUROC.
    * "scores": the same of the plain scores of whole images, against synthetic outliers.
    """

    loss: Loss = "none"
    outlier: Outlier = "noise"
    """Of "outliers": features with noise, with channels of another feature, beyond another feature, plus the difference
    of two others, or features of synthetic outlier images."""
    strength: float = 0.25
    """Of the outlier: standard deviation of the noise, part of the channels, length of the step."""
    own: bool = False
    """Pair each normal with its own outlier only."""
    start: Literal["random", "coreset", "kmeans", "normal"] = "kmeans"
    """First prototypes: as they are filled, or N(0, 1)."""
    prototypes: tuple[int, ...] = (64,)
    """M of each memory: one number, or one per scale."""
    steps: int = 100
    rate: float = 0.01
    """Peak of Adam's learning rate."""
    batch: int = 512
    """Features of each scale in a step."""
    pairs: int = 128
    """Outliers with which each normal of a step is compared."""
    beta_factor: float = 4.0
    """beta in units of 1/sqrt(d)."""
    learn_beta: bool = False
    copies: bool = False
    """Also learn from the light copies; the contrast always does."""
    negatives: Negatives = "both"
    temperature: float = 0.2
    keep_false: bool = True
    """False takes negatives out of the contrast whose cosine with the feature is above `FALSE`."""
    width: float | None = None
    """Of a learned projection with orthonormal rows, as a part of d."""


class CellFeatures(NamedTuple):
    """The features of the cells of one type at each scale, [n, P_s, d_s] float16."""

    cells: list[Tensor]
    """All cells that are certainly normal or certainly defective."""
    row: Tensor
    """[N] int64: row of `cells` of every cell of the type, −1 where it has none."""
    normal_row: Tensor
    """[N] int64: row of a copy or outlier."""
    copies: list[list[Tensor]]
    """`COPIES` light copies of all normal cells."""
    outliers: list[list[Tensor]]
    """`COPIES` synthetic outliers made of them."""

    def of(self, rows: Tensor) -> list[Tensor]:
        """The LayerNormed features of some cells [n] int64, float32."""
        return _normalized(self.cells, self.row[rows])

    def made(self, sets: Sequence[Sequence[Tensor]], rows: Tensor) -> list[list[Tensor]]:
        """Those of copies or outliers of some normal cells [n] int64."""
        return [_normalized(one, self.normal_row[rows]) for one in sets]


def _normalized(features: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [normalize_rows(of_scale[rows].float(), "layer") for of_scale in features]


def frozen_model(kind: str) -> AnoMem:
    """The frozen encoder, with memories to be replaced."""
    config = resolved(FitConfig(data=DataConfig(dataset="elpv", normal=kind)), quiet=True)
    return model_to_fit(config, task_of(Cut(kind, 0), SIDE)).eval()


@functools.cache
def features_of(kind: str, folder: Path | None) -> CellFeatures:
    """Encode the cells, their copies and outliers once.

    Args:
        kind: "mono" or "poly".
        folder: keeps them for the next process; None keeps nothing.
    """
    file = None if folder is None else folder / f"features-{kind}.pt"
    probabilities = cells_of(kind, SIDE).probabilities
    normals = (probabilities == 0).nonzero().flatten()
    certain = ((probabilities == 0) | (probabilities == 1)).nonzero().flatten()
    if file is not None and file.exists():
        cells, copies, outliers = torch.load(file, weights_only=True)
    else:
        model, images = frozen_model(kind), cells_of(kind, SIDE).images
        generator = torch.Generator().manual_seed(0)
        light = Augmentation(LIGHT)
        cells = _encoded(model, images[certain])
        copies = [_encoded(model, light(images[normals], generator)) for _ in range(COPIES)]
        outliers = [_encoded(model, synthesize_outliers(images[normals], generator)) for _ in range(COPIES)]
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save((cells, copies, outliers), file)
    rows = [torch.full((len(probabilities),), -1) for _ in range(2)]
    for row, of in zip(rows, (certain, normals), strict=True):
        row[of] = torch.arange(len(of))
    return CellFeatures(cells, *rows, copies, outliers)


@torch.no_grad()
def _encoded(model: AnoMem, images: Tensor) -> list[Tensor]:
    parts = [[query.half() for query in model.queries(model(x))] for x in images.split(64)]
    return [torch.cat(of_scale) for of_scale in zip(*parts, strict=True)]


class Learned(NamedTuple):
    """The memories of a recipe."""

    memories: list[HopfieldMemory]
    projections: list[nn.Module]
    seconds: float
    """CPU time of start and steps."""

    @property
    def bytes(self) -> int:
        """Of prototypes and projections."""
        parts = [p for m in (*self.memories, *self.projections) for p in m.parameters() if p.dim() == 2]
        return sum(part.nbytes for part in parts)

    @torch.no_grad()
    def plain(self, features: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The plain score of `FilledScorer`: S tensors [B, P_s, d_s] -> [B]."""
        total = torch.zeros(len(features[0]))
        for z, memory, projection, weight in zip(features, self.memories, self.projections, weights, strict=True):
            found = AF.read_memory(
                projection(z), memory.prototypes, beta=float(memory.beta), top_k=min(TOP_K, len(memory.prototypes))
            )
            total += weight * top(found.cosine)
        return total


def top(distances: Tensor) -> Tensor:
    """Mean over the largest tenth: [B, P] -> [B]."""
    return distances.topk(max(1, int(distances.shape[1] * TOP_PART)), dim=1).values.mean(dim=1)


def deviation(z: Tensor, memory: HopfieldMemory) -> Tensor:
    """1 − cos(z, HF(z)): [..., d] -> [...]."""
    return 1 - nn.functional.cosine_similarity(normalize_rows(z, memory.normalize), memory(z), dim=-1)


class Normals:
    """The features of the cells of one split that a recipe learns from.

    Args:
        kind: "mono" or "poly".
        seed: of the split.
        folder: as in `features_of`.
    """

    def __init__(self, kind: str, seed: int, folder: Path | None) -> None:
        self.features, self.split = features_of(kind, folder), split_of(kind, seed)
        self.cells = self.features.of(self.split.train)

    def encoded(self, rows: Tensor) -> list[list[Tensor]]:
        """Batches of cells [n] int64 as the encoder gives them, which `FilledScorer` judges in their own units."""
        features = self.features
        return [[of_scale[features.row[part]].float() for of_scale in features.cells] for part in rows.split(64)]

    @functools.cached_property
    def sets(self) -> list[list[Tensor]]:
        """The cells, and `COPIES` light copies of them."""
        return [self.cells, *self.features.made(self.features.copies, self.split.train)]

    @functools.cached_property
    def outliers(self) -> list[list[Tensor]]:
        """`COPIES` synthetic outliers of each."""
        return self.features.made(self.features.outliers, self.split.train)

    @functools.cached_property
    def test(self) -> list[list[Tensor]]:
        """Test cells without a defect, with one, and synthetic outliers of the former."""
        features, split = self.features, self.split
        made = features.made(features.outliers[:1], split.test_normal)
        return [features.of(split.test_normal), features.of(split.test_defect), *made]


@functools.lru_cache(maxsize=2)
def normals_of(kind: str, seed: int, folder: Path | None) -> Normals:
    """The last two that were asked for are held."""
    return Normals(kind, seed, folder)


def learn(recipe: Recipe, normals: Normals, seed: int) -> Learned:
    """Follow a recipe.

    Args:
        recipe: what to do.
        normals: to learn from.
        seed: of the start and of all random numbers.
    """
    begin = time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = _learn(recipe, normals, seed)
    return Learned(*found, time.process_time() - begin)


def _learn(recipe: Recipe, normals: Normals, seed: int) -> tuple[list[HopfieldMemory], list[nn.Module]]:
    cells = normals.cells
    counts = recipe.prototypes * len(cells) if len(recipe.prototypes) == 1 else recipe.prototypes
    memories, projections = [], []
    for z, count in zip(cells, counts, strict=True):
        projection = _projection(z.shape[-1], recipe.width)
        with torch.no_grad():
            rows = normalize_rows(projection(z.flatten(0, 1)), "layer")
        width = rows.shape[1]
        memory = HopfieldMemory(width, count, beta=recipe.beta_factor / width**0.5, learn_beta=recipe.learn_beta)
        if recipe.start != "normal":
            method: Fill = recipe.start
            memory.prototypes.data.copy_(fill_prototypes(rows, count, method, seed=seed))
        memories.append(memory)
        projections.append(projection)
    if recipe.loss != "none":
        loss = LOSSES[recipe.loss](recipe, memories, projections, normals)
        _descend(recipe, loss, [p for module in (*memories, *projections) for p in module.parameters()])
    return memories, projections


def _projection(width: int, part: float | None) -> nn.Module:
    if part is None:
        return nn.Identity()
    linear = nn.Linear(width, round(part * width), bias=False)
    return nn.utils.parametrizations.orthogonal(linear)


def _descend(recipe: Recipe, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> None:
    optimizer = torch.optim.Adam(parameters, lr=recipe.rate, betas=(0.9, 0.99))
    for step in range(recipe.steps):
        rate = recipe.rate * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _contrast(
    recipe: Recipe, memories: list[HopfieldMemory], projections: list[nn.Module], normals: Normals
) -> Callable[[], Tensor]:
    """Stage 1's loss of two copies of a batch of images, eight positions of each."""
    sets = normals.sets
    criterion = ContrastedMemoryLoss(recipe.temperature, negatives=recipe.negatives)
    images = min(recipe.batch // 16, len(sets[0][0]))  # eight positions of two copies

    def loss() -> Tensor:
        chosen = torch.randperm(len(sets[0][0]))[:images]
        first, second = torch.randperm(len(sets))[:2].tolist()
        total = torch.zeros(())
        for scale, (memory, projection) in enumerate(zip(memories, projections, strict=True)):
            positions = torch.randperm(sets[0][scale].shape[1])[:8]
            z, pair = (
                projection(sets[one][scale][chosen][:, positions].transpose(0, 1)).contiguous()
                for one in (first, second)
            )
            of_scale = criterion(z, pair, memory)[0] if recipe.keep_false else without_false(z, pair, memory, recipe)
            total = total + 2.0 ** (scale + 1 - len(memories)) * of_scale
        return total

    return loss


def without_false(z: Tensor, pair: Tensor, memory: HopfieldMemory, recipe: Recipe) -> Tensor:
    """NT-Xent of z and HF(pair) [n, B, d], of which pairs of images with cosine > `FALSE` are left out."""
    unit = nn.functional.normalize(torch.cat([z, memory(pair)], dim=1), dim=-1)
    same = nn.functional.normalize(z, dim=-1)
    count = z.shape[1]
    partner = torch.arange(2 * count).roll(count)
    false = (same @ same.mT > FALSE).repeat(1, 2, 2)
    false[:, torch.arange(2 * count), partner] = False
    false[:, torch.arange(2 * count), torch.arange(2 * count)] = True
    scores = unit @ unit.mT / recipe.temperature
    positive = scores[:, torch.arange(2 * count), partner]
    return (scores.masked_fill(false, -math.inf).logsumexp(dim=2) - positive).mean()


def _features(
    recipe: Recipe, memories: list[HopfieldMemory], projections: list[nn.Module], normals: Normals
) -> Callable[[], Tensor]:
    """Losses of single features: "read", "worst" and "outliers"."""
    pools = [
        torch.cat([one[scale].flatten(0, 1) for one in (normals.sets if recipe.copies else [normals.cells])])
        for scale in range(len(memories))
    ]
    made = normals.outliers if recipe.outlier == "images" else []
    damaged = [torch.cat([one[scale].flatten(0, 1) for one in made]) for scale in range(len(memories)) if made]
    spreads: list[float] = []

    def loss() -> Tensor:
        total = torch.zeros(())
        for scale, (memory, projection, pool) in enumerate(zip(memories, projections, pools, strict=True)):
            a, b, c = (pool[torch.randint(len(pool), (recipe.batch,))] for _ in range(3))
            normal = deviation(projection(a), memory)
            if recipe.loss != "outliers":
                worst = recipe.batch // 10 if recipe.loss == "worst" else recipe.batch
                total = total + normal.topk(worst).values.mean() / 0.05
                continue
            count = recipe.batch if recipe.own else recipe.pairs
            if recipe.outlier == "images":
                x = damaged[scale][torch.randint(len(damaged[scale]), (count,))]
            else:
                x = outlier_of(a[:count], b[:count], c[:count], recipe)
            outlying = deviation(projection(x), memory)
            if len(spreads) == scale:
                spreads.append(float(normal.detach().std()))
            total = total + ranked(normal, outlying, spreads[scale], recipe.own)
        return total

    return loss


def outlier_of(a: Tensor, b: Tensor, c: Tensor, recipe: Recipe) -> Tensor:
    """Outliers [N, d] made of normal features [N, d] each."""
    if recipe.outlier == "noise":
        return a + recipe.strength * torch.randn_like(a)
    if recipe.outlier == "mixed":
        return torch.where(torch.rand_like(a) < recipe.strength, b, a)
    return a + recipe.strength * (a - b if recipe.outlier == "beyond" else b - c)


def ranked(normal: Tensor, outlying: Tensor, spread: float, own: bool = False) -> Tensor:
    """softplus((normal − outlying) / spread), the mean over pairs: [N] and [K] -> 0-dim."""
    difference = normal - outlying if own else normal[:, None] - outlying[None]
    return nn.functional.softplus(difference / spread).mean()


def _scores(
    recipe: Recipe, memories: list[HopfieldMemory], projections: list[nn.Module], normals: Normals
) -> Callable[[], Tensor]:
    """The plain scores of whole images against those of synthetic outliers."""
    images = max(2, recipe.batch // 64)
    spread: list[float] = []

    def plain(features: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(len(features[0]))
        for scale, (z, memory, projection) in enumerate(zip(features, memories, projections, strict=True)):
            total = total + 2.0 ** (scale + 1 - len(memories)) * top(deviation(projection(z), memory))
        return total

    def loss() -> Tensor:
        chosen = torch.randperm(len(normals.cells[0]))[:images]
        made = normals.outliers[int(torch.randint(COPIES, ()))]
        normal, outlying = (plain([z[chosen] for z in one]) for one in (normals.cells, made))
        if not spread:
            spread.append(float(normal.detach().std()))
        return ranked(normal, outlying, spread[0])

    return loss


LOSSES = {"contrast": _contrast, "read": _features, "worst": _features, "outliers": _features, "scores": _scores}


def measured(learned: Learned, normals: Normals, weights: Sequence[float]) -> tuple[float, float]:
    """AUROC of the plain score of test cells: against defects, and against synthetic outliers of the normal ones."""
    normal, *others = (learned.plain(part, weights) for part in normals.test)
    against_defects, against_outliers = (
        auroc(torch.cat([normal, other]), torch.arange(len(normal) + len(other)) >= len(normal)) for other in others
    )
    return against_defects, against_outliers


def split_of(kind: str, seed: int) -> Split:
    """Rows of the cells of one type."""
    return split_cells(cells_of(kind, SIDE).probabilities, kind, seed)


RECIPES: dict[str, Recipe] = {
    "filled: k-means": Recipe(),
    "filled: coreset": Recipe(start="coreset"),
    "filled: random rows": Recipe(start="random"),
    "filled: N(0, 1)": Recipe(start="normal"),
    "contrast, images": Recipe("contrast", negatives="image", rate=0.003),
    "contrast, positions": Recipe("contrast", negatives="position", rate=0.003),
    "contrast, both": Recipe("contrast", rate=0.003),
    "contrast, both, rate 0.0003": Recipe("contrast", rate=0.0003),
    "contrast, both, from N(0, 1)": Recipe("contrast", start="normal", rate=0.03),
    "contrast, no false negatives": Recipe("contrast", rate=0.003, keep_false=False),
    "contrast, both, orthogonal half width, M = 128": Recipe("contrast", rate=0.003, width=0.5, prototypes=(128,)),
    "contrast, both, beta 1/√d": Recipe("contrast", rate=0.003, beta_factor=1.0),
    "deviation": Recipe("read"),
    "deviation, largest tenth": Recipe("worst"),
    "synthetic images, scores": Recipe("scores", batch=2048, steps=50),
    "synthetic images, features": Recipe("outliers", "images"),
    "channels mixed": Recipe("outliers", "mixed", 0.5),
    "beyond another feature": Recipe("outliers", "beyond", 0.5),
    "other features' difference": Recipe("outliers", "other", 0.5),
    "noise 0.1": Recipe("outliers", strength=0.1),
    "noise 0.25": Recipe("outliers"),
    "noise 0.5": Recipe("outliers", strength=0.5),
    "noise 0.25, own pairs": Recipe("outliers", own=True),
    "noise 0.25, rate 0.03": Recipe("outliers", rate=0.03),
    "noise 0.25, rate 0.003": Recipe("outliers", rate=0.003),
    "noise 0.25, 200 steps of 1024": Recipe("outliers", steps=200, batch=1024),
    "noise 0.25, 512 pairs": Recipe("outliers", pairs=512),
    "noise 0.25, light copies too": Recipe("outliers", copies=True),
    "noise 0.25, from random rows": Recipe("outliers", start="random"),
    "noise 0.25, beta learned": Recipe("outliers", learn_beta=True),
    "noise 0.25, beta 8/√d": Recipe("outliers", beta_factor=8.0),
    "noise 0.25, beta 2/√d": Recipe("outliers", beta_factor=2.0),
    "noise 0.25, M = 121, 64, 40": Recipe("outliers", prototypes=(121, 64, 40)),
    "noise 0.25, M = 40, 64, 74": Recipe("outliers", prototypes=(40, 64, 74)),
    "noise 0.25, orthogonal half width, M = 128": Recipe("outliers", width=0.5, prototypes=(128,)),
    "beyond another feature, rate 0.03": Recipe("outliers", "beyond", 0.5, rate=0.03),
    "beyond another feature, rate 0.03, 200 steps": Recipe("outliers", "beyond", 0.5, rate=0.03, steps=200),
    "noise 0.5, rate 0.03, 200 steps": Recipe("outliers", strength=0.5, rate=0.03, steps=200),
}
"""Name -> recipe; all have the bytes of 64 prototypes per scale, projections apart."""
