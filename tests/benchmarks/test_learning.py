"""Recipes that learn a memory: each runs on made-up features, and the tables compare within a split."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anomem.data.elpv import Split
from anomem.nn import HopfieldMemory
from anomem.reference.contrast import nt_xent_rows
from benchmarks.accuracy import learning, recipes
from benchmarks.accuracy.learning import BUDGETS, ROWS, SEEDS, LearningRow
from benchmarks.accuracy.recipes import RECIPES, CellFeatures, Recipe, learn, measured, without_false
from benchmarks.harness import rows
from benchmarks.harness.rows import RESULTS
from benchmarks.report.learning import FILLED, SECTIONS
from benchmarks.report.learning import recipes as table

SPLIT = Split(torch.arange(12), torch.arange(12, 20), torch.arange(20, 20), torch.arange(20, 26))


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def normals(monkeypatch: pytest.MonkeyPatch) -> recipes.Normals:
    scales = ((16, 12), (16, 12), (4, 16))
    cells = [made(26, *scale, seed=0) for scale in scales]
    others = [[made(20, *scale, seed=seed) for scale in scales] for seed in (1, 2)]
    normal_row = torch.cat([torch.arange(20), torch.full((6,), -1)])
    features = CellFeatures(cells, torch.arange(26), normal_row, others, others)
    monkeypatch.setattr(recipes, "features_of", lambda kind, folder: features)
    monkeypatch.setattr(recipes, "split_of", lambda kind, seed: SPLIT)
    return recipes.Normals("mono", 0, None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_moves_the_prototypes_it_starts_from(normals: recipes.Normals, name: str) -> None:
    small = tuple(max(2, count // 16) for count in RECIPES[name].prototypes)
    recipe = replace(RECIPES[name], steps=2, batch=64, pairs=16, prototypes=small)
    learned = learn(recipe, normals, 1)
    start = learn(replace(recipe, loss="none"), normals, 1)
    assert all(m.prototypes.isfinite().all() for m in learned.memories)
    for moved, first in zip(learned.memories, start.memories, strict=True):
        assert torch.equal(moved.prototypes, first.prototypes) == (recipe.loss == "none")
    again = learn(recipe, normals, 1)
    assert torch.equal(again.memories[0].prototypes, learned.memories[0].prototypes)
    assert all(0 <= value <= 1 for value in measured(learned, normals, (0.25, 0.5, 1.0)))


def test_recipes_have_the_bytes_of_64_prototypes() -> None:
    widths = (80, 112, 192)  # of the frozen encoder's scales
    for name, recipe in RECIPES.items():
        counts = recipe.prototypes * 3 if len(recipe.prototypes) == 1 else recipe.prototypes
        held = sum(m * round(d * (recipe.width or 1)) for m, d in zip(counts, widths, strict=True))
        assert 0.99 * 64 * sum(widths) <= held <= 64 * sum(widths), name


def test_false_negatives_are_left_out() -> None:
    z, pair = (made(2, 5, 12, seed=seed).float() for seed in (0, 1))
    memory = HopfieldMemory(12, 3)
    recipe = Recipe("contrast")
    whole = nt_xent_rows(z, memory(pair), recipe.temperature).mean()
    torch.testing.assert_close(without_false(z, pair, memory, recipe), whole)
    same = z.clone()
    same[:, 1] = same[:, 0]  # the same part of two images
    left_out = without_false(same, pair, memory, recipe).detach()
    kept = nt_xent_rows(same, memory(pair), recipe.temperature).mean().detach()
    assert float(left_out) < float(kept) - 1e-3
    assert math.isfinite(float(left_out))


def test_committed_rows_show_what_is_claimed() -> None:
    found = rows.read(RESULTS / ROWS, LearningRow)
    assert not any(one.dirty for one in found)
    assert all(one.threads == 1 for one in found)
    tried = {(one.setting, one.normal) for one in found if one.part == "recipes" and one.seed == 0 and one.steps}
    assert len({name for name, _ in tried if {(name, "mono"), (name, "poly")} <= tried}) >= 20
    plain = {
        (one.normal, one.seed, one.setting): one
        for one in found
        if one.part == "frozen" and one.score == "plain" and one.steps in (0, BUDGETS[-1])
    }
    for kind in ("mono", "poly"):
        for seed in SEEDS:
            filled, learned = (plain[kind, seed, setting] for setting in ("filled", "learned"))
            assert learned.auroc > filled.auroc, (kind, seed)
            assert learned.memory_bytes == filled.memory_bytes


def row(setting: str, normal: str, auroc: float, **others: object) -> LearningRow:
    fixed = {"part": "recipes", "dataset": "elpv", "seed": 0, "steps": 0, "score": "plain", "prototypes": [64]}
    fixed |= {"memory_bytes": 98304, "seconds": 1.0, "commit": "0", "dirty": False, "torch": "2", "threads": 1}
    return LearningRow(setting=setting, normal=normal, auroc=auroc, processor="x", **{**fixed, **others})  # type: ignore[arg-type]


def test_a_gain_is_over_k_means_on_the_same_split(tmp_path: Path) -> None:
    for name, section in SECTIONS.items():
        assert section(tmp_path) == "Not measured yet.", name
    found = [row(FILLED, "mono", 0.9), row(FILLED, "poly", 0.8), row("new", "mono", 0.92), row("new", "poly", 0.79)]
    other = [row("half", "mono", 1.0), row("new", "mono", 1.0, seed=1)]
    rows.append(tmp_path / ROWS, *found, *other)
    (last,) = [line for line in table(tmp_path).splitlines() if line.startswith("| new |")]
    assert last.endswith("| 0.9200 | 0.7900 | +0.0050 |")
    assert "half" not in table(tmp_path), "one type is no mean"


def test_seeds_are_compared_with_themselves(tmp_path: Path) -> None:
    of = {"part": "frozen", "normal": "mono"}
    filled = [row("filled", auroc=0.8 + seed / 100, seed=seed, **of) for seed in (0, 1, 2)]
    learned = [row("learned", auroc=value, seed=seed, steps=200, **of) for seed, value in ((0, 0.82), (1, 0.80))]
    early = row("learned", auroc=0.99, steps=25, **of)
    rows.append(tmp_path / ROWS, *filled, *learned, early)
    assert SECTIONS["learning-sizes"](tmp_path).splitlines()[2:] == [
        "| mono | 64 | 96 | plain | 0.8000 / 0.8100 | 0.8200 / 0.8000 | +0.0050 | 1 of 2 |"
    ]
    assert "| filled | 0 | 0.8100 | – |" in SECTIONS["learning-frozen"](tmp_path)


def test_a_finished_setting_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(learning, "RECIPES", {FILLED: Recipe()})
    monkeypatch.setattr(learning, "normals_of", lambda *_: None)
    monkeypatch.setattr(learning, "measured", lambda *_: (0.5, 0.5))

    def learned(*_: object) -> recipes.Learned:
        runs.append(1)
        return recipes.Learned([HopfieldMemory(4, 2)], [], 0.0)

    monkeypatch.setattr(learning, "learn", learned)
    for _ in range(2):
        learning.main(learning.Options(results=tmp_path, parts=("recipes",), seeds=(0,)))
    assert len(runs) == 2  # one for each type
    assert {found.normal for found in rows.read(tmp_path / ROWS, LearningRow)} == {"mono", "poly"}
