"""Learning's worth: trained, untrained and filled memories at equal bytes. `python -m benchmarks.accuracy.learning`.

Three parts, each of which continues where it was stopped:

* "recipes": ways to learn the memories of a frozen encoder (`benchmarks.accuracy.recipes`), on seed 0; the chosen one
  and k-means on every seed.
* "frozen": the library's learned memories on the frozen encoder after 25 to 200 steps, and at three sizes.
* "scratch": the small encoder on 64 pixels, trained for 25 to 200 steps, against the untrained one, and each with
  memories filled by k-means.

The solar cells are under CC BY-NC-SA 4.0: they are measured on, and neither they nor pictures of them are kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from torch import Tensor, nn

from anomem.data import Task, load_task
from anomem.data.elpv import TYPES
from anomem.evaluate.metrics import auroc
from anomem.evaluate.report import calibrate_untrained
from anomem.models import AnoMem
from anomem.scoring import FilledScorer, NormalQueries, Scorer, fill_memories, fit_scorer, score_images
from anomem.scoring.fill import fill_prototypes
from anomem.scoring.learn import learn_prototypes
from anomem.train import TrainConfig, preset
from anomem.train.run import model_for, train_task
from benchmarks.accuracy.cells import Cut, task_of
from benchmarks.accuracy.recipes import RECIPES, Normals, frozen_model, learn, measured, normals_of
from benchmarks.accuracy.settings import TEXTURES
from benchmarks.harness import rows

ROWS = "learning.jsonl"
SEEDS = (0, 1, 2)
BUDGETS = (25, 50, 100, 200)
"""Gradient steps."""
SIZES = (64, 256, 1024)
"""M of each memory of the frozen encoder; the budgets are those of the first."""
BETA_FACTOR = 4.0
"""Of filled memories, in units of 1/sqrt(d); memories trained from scratch keep the preset's 1/sqrt(d)."""
FILLED, CHOSEN = "filled: k-means", "noise 0.25"
"""The recipes that are measured on every seed."""
SCRATCH_SIDE = 64
WEIGHTS = (0.25, 0.5, 1.0)
"""lambda_s of the frozen encoder's scales."""

Part = Literal["recipes", "frozen", "scratch"]


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
    """Every recipe on seed 0; k-means and the chosen one on every seed."""
    for seed in options.seeds:
        for name, recipe in RECIPES.items():
            wanted = name in options.recipes or not options.recipes
            if not wanted or (seed != SEEDS[0] and name not in (FILLED, CHOSEN)):
                continue
            steps = 0 if recipe.loss == "none" else recipe.steps
            for kind in TYPES:
                of = ("elpv", kind, seed)
                if log.has("recipes", of, name, steps, recipe.prototypes):
                    continue
                normals = normals_of(kind, seed, options.cache)
                learned = learn(recipe, normals, seed)
                plain, synthetic = measured(learned, normals, WEIGHTS)
                fields = {"synthetic": synthetic, "recipe": asdict(recipe), "prototypes": list(recipe.prototypes)}
                seconds = round(learned.seconds, 1)
                log.add(
                    "recipes", of, name, steps, {"plain": plain}, memory_bytes=learned.bytes, seconds=seconds, **fields
                )


def run_frozen(options: Options, log: Log) -> None:
    """The library's learned memories, their budgets at the first size and the last budget at the others."""
    for seed in options.seeds:
        for kind in TYPES:
            of = ("elpv", kind, seed)
            for size in SIZES:
                budgets = BUDGETS if size == SIZES[0] else BUDGETS[-1:]
                wanted = [("untrained", 0), ("filled", 0), *(("learned", steps) for steps in budgets)]
                missing = [(name, steps) for name, steps in wanted if not log.has("frozen", of, name, steps, [size])]
                if missing:
                    _frozen(options, log, of, size, missing)


def _frozen(options: Options, log: Log, of: tuple[str, str, int], size: int, missing: list[tuple[str, int]]) -> None:
    _, kind, seed = of
    normals, model = normals_of(kind, seed, options.cache), frozen_model(kind)
    cells = normals.cells
    begin = time.process_time()
    filled = [fill_prototypes(z.flatten(0, 1), size, "kmeans", seed=seed) for z in cells]
    filling = time.process_time() - begin
    for name, steps in missing:
        begin = time.process_time()
        if name == "untrained":
            generator = torch.Generator().manual_seed(seed)
            chosen = [torch.randn(start.shape, generator=generator) for start in filled]
        else:
            chosen = [
                learn_prototypes(z.flatten(0, 1), start, beta=float(memory.beta), steps=steps, seed=seed)
                for z, start, memory in zip(cells, filled, model.memories, strict=True)
            ]
        seconds = time.process_time() - begin + (0 if name == "untrained" else filling)
        scores = _filled_scores(model, chosen, normals)
        bytes_ = sum(prototypes.nbytes for prototypes in chosen)
        log.add("frozen", of, name, steps, scores, prototypes=[size], memory_bytes=bytes_, seconds=round(seconds, 1))


def _filled_scores(model: AnoMem, prototypes: Sequence[Tensor], normals: Normals) -> dict[str, float]:
    """AUROC of "plain", "local" and "both" with these prototypes."""
    for memory, chosen in zip(model.memories, prototypes, strict=True):
        memory.prototypes = nn.Parameter(chosen, requires_grad=False)
    scorer = FilledScorer(model, "per_position")
    scorer.fit(list(zip(*(z.split(64) for z in normals.cells), strict=True)))
    normal, defect, _ = normals.test
    parts = [scorer.of_queries(cells, (1, 1)).scores for cells in (normal, defect)]
    is_defect = torch.arange(len(normal[0]) + len(defect[0])) >= len(normal[0])
    return {name: auroc(torch.cat([part[name] for part in parts]), is_defect) for name in ("plain", "local", "both")}


def run_scratch(options: Options, log: Log) -> None:
    """Trained encoders and the untrained one."""
    for seed in options.seeds:
        for dataset, normal in (*(("elpv", kind) for kind in TYPES), *(("textures", name) for name in TEXTURES)):
            of = (dataset, normal, seed)
            config = scratch_config(dataset, normal, seed)
            task: Task | None = None
            for steps in (0, *BUDGETS):
                name = "trained" if steps else "untrained"
                if log.has("scratch", of, f"{name}, filled", steps, config.model.prototypes):
                    continue
                task = task or (
                    task_of(Cut(normal, seed), SCRATCH_SIDE) if dataset == "elpv" else load_task(config.data)
                )
                _scratch(
                    log, of, replace(config, optimizer=replace(config.optimizer, steps=max(1, steps))), task, steps
                )


def scratch_config(dataset: str, normal: str, seed: int) -> TrainConfig:
    """The data set's preset, with batches of 32 and a detector without copies, which cost time on two cores."""
    config = preset(dataset)
    return replace(
        config,
        data=replace(config.data, normal=normal, seed=seed),
        optimizer=replace(config.optimizer, batch_size=32),
        score=replace(config.score, copies=0, pool="topk" if dataset == "elpv" else "mean"),
        run=replace(config.run, seed=seed, device="cpu"),
    )


def _scratch(log: Log, of: tuple[str, str, int], config: TrainConfig, task: Task, steps: int) -> None:
    """Train (or calibrate) an encoder; score it with its own memories, then with memories that k-means fills."""
    model = model_for(config, task)
    begin = time.process_time()
    name = "trained" if steps else "untrained"
    fields: dict[str, Any] = {
        "prototypes": list(config.model.prototypes),
        "memory_bytes": sum(memory.prototypes.nbytes for memory in model.memories),
    }

    def add(setting: str, scorer: Scorer) -> None:
        found = score_images(scorer, task.test).scores
        scores = {score: auroc(found[score], task.test_is_anomaly) for score in ("plain", "detector")}
        log.add("scratch", of, setting, steps, scores, seconds=round(time.process_time() - begin, 1), **fields)

    if steps:
        add(name, train_task(config, task, model, quiet=True))
    else:
        calibrate_untrained(model, task.train, task.train_is_normal, config.score.batch_size, config.run.seed)
    for memory, width in zip(model.memories, model.features, strict=True):
        memory.beta = BETA_FACTOR / width**0.5
    order = task.train_is_normal.nonzero().flatten()
    queries = NormalQueries(model, lambda: (x for x, _ in task.train.batches(order, config.score.batch_size)))
    fill_memories(model, queries, config.model.prototypes, seed=config.run.seed)
    scorer = fit_scorer(
        model, task.train, task.train_is_normal, aligned=task.aligned, augment=config.augment, config=config.score
    )
    add(f"{name}, filled", scorer)


def main(options: Options) -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    log = Log(options.results / ROWS)
    for part, run in (("recipes", run_recipes), ("frozen", run_frozen), ("scratch", run_scratch)):
        if part in options.parts:
            run(options, log)


if __name__ == "__main__":
    main(tyro.cli(Options, description=Options.__doc__))
