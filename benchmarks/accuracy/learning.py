"""Learning's worth: trained, untrained and filled memories at equal bytes. `python -m benchmarks.accuracy.learning`.

Four parts, each of which continues where it was stopped:

* "recipes": ways to learn the memories of a frozen encoder (`benchmarks.accuracy.recipes`), on seed 0.
* "frozen": the chosen recipe as the library has it, after 25 to 200 steps, against the centres of k-means from which it
  starts and against N(0, 1).
* "scratch": the small encoder on 64 pixels, trained for 25 to 200 steps, against the untrained one, and each with
  memories filled by k-means.
* "sizes": learned and filled memories of more prototypes.

The solar cells are under CC BY-NC-SA 4.0: they are measured on, and neither they nor pictures of them are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from torch import Tensor, nn

from anomem.data import Images, Task, load_task
from anomem.data.elpv import TYPES
from anomem.evaluate.metrics import auroc
from anomem.evaluate.report import calibrate_untrained
from anomem.models import AnoMem
from anomem.scoring import FilledScorer, fill_memories
from anomem.scoring.detector import Alignment
from anomem.scoring.fill import fill_prototypes
from anomem.scoring.learn import learn_prototypes
from anomem.train import TrainConfig, preset
from anomem.train.run import model_for
from anomem.train.stage1 import train_stage1
from anomem.validation import require_choice
from benchmarks.accuracy.cells import Cut, task_of
from benchmarks.accuracy.recipes import RECIPES, frozen_model, learn, measured, normals_of
from benchmarks.harness import rows

ROWS = "learning.jsonl"
SEEDS = (0, 1, 2)
BUDGETS = (25, 50, 100, 200)
"""Gradient steps."""
SMALL, LARGER = 64, (256, 1024)
"""M of each memory of the frozen encoder, in "frozen" and in "sizes"."""
BETA_FACTOR = 4.0
"""Of filled memories, in units of 1/sqrt(d); memories trained from scratch keep the preset's 1/sqrt(d)."""
SCRATCH_SIDE = 64
UNTRAINED = -1
"""A budget that stands for prototypes from N(0, 1)."""
SCRATCH = (("elpv", "mono"), ("elpv", "poly"), ("textures", "brick"))
"""Data sets and normal classes that are trained from scratch."""
WEIGHTS = (0.25, 0.5, 1.0)
"""lambda_s of the frozen encoder's scales."""

Part = Literal["recipes", "frozen", "scratch", "sizes"]


@dataclass
class LearningRow:
    """One score of one setting after some steps on one split."""

    part: Part
    dataset: str
    normal: str
    seed: int
    setting: str
    steps: int
    """Gradient steps."""
    score: str
    auroc: float
    prototypes: list[int]
    """M of each memory, or one number for all."""
    memory_bytes: int
    """Of prototypes and projections."""
    seconds: float
    """CPU time of learning and filling, without the encoder's own in "recipes" and "frozen"."""
    commit: str
    dirty: bool
    torch: str
    processor: str
    threads: int
    synthetic: float | None = None
    """AUROC against synthetic outliers of the normal test cells."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The settings of a recipe."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The last row for the same score of the same setting counts."""
        return self.part, self.dataset, self.normal, self.seed, self.setting, self.steps, *self.prototypes, self.score


@dataclass(frozen=True)
class Options:
    """Trained, untrained and filled memories at equal bytes."""

    results: Path = rows.RESULTS
    """Folder of learning.jsonl; what it holds is not run again."""
    parts: tuple[Part, ...] = get_args(Part)
    """Parts to run."""
    seeds: tuple[int, ...] = SEEDS
    """Splits to run."""
    recipes: tuple[str, ...] = ()
    """Recipes to run; all when empty."""
    cache: Path | None = None
    """Folder of the encoded cells, so that the next process need not encode them."""


class Log:
    """The file of rows. State of the code and machine are read at the start: later edits do not change what runs.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        about = rows.about("cpu")
        self.about = {name: about[name] for name in ("commit", "dirty", "torch", "threads")}
        self.about["processor"] = about["device_name"]
        self.done = {row.key[:-1] for row in rows.read(path, LearningRow)}

    def has(self, part: Part, of: tuple[str, str, int], setting: str, steps: int, prototypes: Sequence[int]) -> bool:
        """Whether the scores of a setting are there."""
        return (part, *of, setting, steps, *prototypes) in self.done

    def add(
        self, part: Part, of: tuple[str, str, int], setting: str, steps: int, scores: dict[str, float], **fields: Any
    ) -> None:
        """Append the rows of a setting, one for each score.

        Args:
            part: of the suite.
            of: data set, normal class, seed.
            setting: its name.
            steps: gradient steps.
            scores: name -> AUROC.
            fields: the other columns.
        """
        dataset, normal, seed = of
        fixed = {"part": part, "dataset": dataset, "normal": normal, "seed": seed, "setting": setting, "steps": steps}
        found = [
            LearningRow(**fixed, score=name, auroc=value, **fields, **self.about) for name, value in scores.items()
        ]
        rows.append(self.path, *found)
        self.done |= {row.key[:-1] for row in found}
        told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"{part} {normal} seed {seed}, {setting}, {steps} steps: {told}; {fields['seconds']} s", flush=True)


def run_recipes(options: Options, log: Log) -> None:
    """Every recipe on seed 0."""
    seed = SEEDS[0]
    for name in options.recipes or RECIPES if seed in options.seeds else ():
        recipe = RECIPES[name]
        steps = 0 if recipe.loss == "none" else recipe.steps
        for kind in TYPES:
            of = ("elpv", kind, seed)
            if log.has("recipes", of, name, steps, recipe.prototypes):
                continue
            normals = normals_of(kind, seed, options.cache)
            learned = learn(recipe, normals, seed)
            plain, synthetic = measured(learned, normals, WEIGHTS)
            fields: dict[str, Any] = {"recipe": asdict(recipe), "prototypes": list(recipe.prototypes)}
            fields |= {"memory_bytes": learned.bytes, "seconds": round(learned.seconds, 1), "synthetic": synthetic}
            log.add("recipes", of, name, steps, {"plain": plain}, **fields)


def run_frozen(options: Options, log: Log) -> None:
    """The library's learned memories after each budget, and what they start from."""
    for budgets in ((0, BUDGETS[-1]), (UNTRAINED, *BUDGETS[:-1])):
        for seed in options.seeds:
            for kind in TYPES:
                _frozen("frozen", options, log, ("elpv", kind, seed), SMALL, budgets)


def run_sizes(options: Options, log: Log) -> None:
    """Learned and filled memories of more prototypes."""
    for size in LARGER:
        for seed in options.seeds:
            for kind in TYPES:
                _frozen("sizes", options, log, ("elpv", kind, seed), size, (0, BUDGETS[-1]))


def _frozen(
    part: Part, options: Options, log: Log, of: tuple[str, str, int], size: int, budgets: Sequence[int]
) -> None:
    """Fill, learn and score memories of one size; prototypes of the budget `UNTRAINED` are drawn from N(0, 1)."""
    _, kind, seed = of
    settings = [("untrained" if b == UNTRAINED else "learned" if b else "filled", max(b, 0)) for b in budgets]
    missing = [setting for setting in settings if not log.has(part, of, *setting, [size])]
    if not missing:
        return
    normals, model = normals_of(kind, seed, options.cache), frozen_model(kind)
    begin = time.process_time()
    filled = [fill_prototypes(z.flatten(0, 1), size, "kmeans", seed=seed) for z in normals.cells]
    filling = time.process_time() - begin
    for name, steps in missing:
        begin = time.process_time()
        if name == "untrained":
            generator = torch.Generator().manual_seed(seed)
            chosen = [torch.randn(start.shape, generator=generator) for start in filled]
        else:
            chosen = [
                learn_prototypes(z.flatten(0, 1), start, beta=float(memory.beta), steps=steps, seed=seed)
                for z, start, memory in zip(normals.cells, filled, model.memories, strict=True)
            ]
        seconds = time.process_time() - begin + (0 if name == "untrained" else filling)
        for memory, prototypes in zip(model.memories, chosen, strict=True):
            memory.prototypes = nn.Parameter(prototypes, requires_grad=False)
        split = normals.split
        parts = (normals.encoded(rows) for rows in (split.train, split.test_normal, split.test_defect))
        scores = filled_scores(FilledScorer(model, "per_position"), *parts)
        log.add(
            part, of, name, steps, scores, prototypes=[size], memory_bytes=bytes_of(model), seconds=round(seconds, 1)
        )


Queries = Sequence[Sequence[Tensor]]
"""Of each batch S tensors [b, P_s, d_s]."""


def filled_scores(scorer: FilledScorer, fitted: Queries, normal: Queries, anomalous: Queries) -> dict[str, float]:
    """AUROC of every score.

    Args:
        scorer: to be fitted.
        fitted: training normals.
        normal: test images.
        anomalous: test images.
    """
    scorer.fit(fitted)
    parts = [scorer.of_queries(of_batch, (1, 1)).scores for of_batch in (*normal, *anomalous)]
    counts = [sum(len(of_batch[0]) for of_batch in of_class) for of_class in (normal, anomalous)]
    is_anomaly = torch.arange(sum(counts)) >= counts[0]
    return {name: auroc(torch.cat([part[name] for part in parts]), is_anomaly) for name in parts[0]}


def bytes_of(model: AnoMem) -> int:
    """Of all prototypes."""
    return sum(memory.prototypes.nbytes for memory in model.memories)


def run_scratch(options: Options, log: Log) -> None:
    """Trained encoders and the untrained one, the smallest budget of every class first."""
    for seed in options.seeds:
        for steps in (0, *BUDGETS):
            for dataset, normal in SCRATCH:
                of = (dataset, normal, seed)
                config = scratch_config(dataset, normal, seed)
                name = "trained" if steps else "untrained"
                if not log.has("scratch", of, f"{name}, filled", steps, config.model.prototypes):
                    task = task_of(Cut(normal, seed), SCRATCH_SIDE) if dataset == "elpv" else load_task(config.data)
                    config = replace(config, optimizer=replace(config.optimizer, steps=max(1, steps)))
                    _scratch(log, of, config, task, steps)


def scratch_config(dataset: str, normal: str, seed: int) -> TrainConfig:
    """The data set's preset with batches of 32 and without the finest scale, which two cores allow."""
    config = preset(dataset)
    return replace(
        config,
        data=replace(config.data, normal=normal, seed=seed),
        model=replace(config.model, scales=("block2", "block3")),
        optimizer=replace(config.optimizer, batch_size=32),
        run=replace(config.run, seed=seed, device="cpu"),
    )


def _scratch(log: Log, of: tuple[str, str, int], config: TrainConfig, task: Task, steps: int) -> None:
    """Train (or calibrate) an encoder; score it with its own memories, then with memories that k-means fills."""
    model = model_for(config, task)
    begin = time.process_time()
    name = "trained" if steps else "untrained"
    if steps:
        train_stage1(model, task.train, None, config, quiet=True)
    else:
        calibrate_untrained(model, task.train, task.train_is_normal, seed=config.run.seed)
    seconds = round(time.process_time() - begin, 1)
    train, normal, anomalous = (
        encoded(model, images, rows)
        for images, rows in (
            (task.train, task.train_is_normal),
            (task.test, ~task.test_is_anomaly),
            (task.test, task.test_is_anomaly),
        )
    )
    alignment: Alignment = "per_position" if task.aligned else "pooled"
    fields: dict[str, Any] = {"prototypes": list(config.model.prototypes), "memory_bytes": bytes_of(model)}
    if steps:
        # Trained memories are read as they were trained: all prototypes, beta 1/√d.
        scores = filled_scores(FilledScorer(model, alignment, top_k=None), train, normal, anomalous)
        log.add("scratch", of, name, steps, scores, seconds=seconds, **fields)
    for memory, width in zip(model.memories, model.features, strict=True):
        memory.beta = BETA_FACTOR / width**0.5
    begin = time.process_time()
    fill_memories(model, train, config.model.prototypes, seed=config.run.seed)
    seconds = round(seconds + time.process_time() - begin, 1)
    scores = filled_scores(FilledScorer(model, alignment), train, normal, anomalous)
    log.add("scratch", of, f"{name}, filled", steps, scores, seconds=seconds, **fields)


@torch.no_grad()
def encoded(model: AnoMem, images: Images, chosen: Tensor) -> list[list[Tensor]]:
    """The queries of some images [N] bool, in batches."""
    order = chosen.nonzero().flatten()
    return [[query.float() for query in model.queries(model(x))] for x, _ in images.batches(order, 64)]


RUNS: dict[Part, Callable[[Options, Log], None]] = {
    "recipes": run_recipes,
    "frozen": run_frozen,
    "scratch": run_scratch,
    "sizes": run_sizes,
}


def main(options: Options) -> None:
    """Run what is missing."""
    for name in options.recipes:
        require_choice(name, "recipes", tuple(RECIPES))
    torch.set_num_threads(1)
    log = Log(options.results / ROWS)
    for part, run in RUNS.items():
        if part in options.parts:
            run(options, log)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.accuracy.learning", description=Options.__doc__))
