"""The training loops: their ranges in a profile, and the figures in their headers."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import anomem.nn.batch_norm as layers
from anomem.data import load_task
from anomem.train import TrainConfig, model_for, stage1, stage2, train_stage1, train_stage2
from anomem.train.run import head_for

ROWS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "accuracy.jsonl"
SHARED = {"anomem.augment", "anomem.encode", "anomem.backward", "anomem.optimizer"}


def ranges(config: TrainConfig, stage: int) -> Counter[str]:
    """How often each range of ours occurs in the profile of a stage."""
    task = load_task(config.data)
    model = model_for(config, task)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        if stage == 1:
            train_stage1(model, task.train, None, config, quiet=True)
        else:
            train_stage2(model, head_for(config, model), task.train, None, config, quiet=True)
    names = (event.name for event in profiler.events())
    return Counter(name for name in names if name.startswith("anomem."))


@pytest.mark.parametrize(("stage", "loss"), [(1, "anomem.contrast"), (2, "anomem.margin")])
def test_a_profile_shows_the_parts_of_every_step(tiny: TrainConfig, stage: int, loss: str) -> None:
    short = {"steps": 2, "warmup": 1}
    config = replace(
        tiny,
        optimizer=replace(tiny.optimizer, **short),
        stage2=replace(tiny.stage2, optimizer=replace(tiny.stage2.optimizer, **short)),
    )
    # The last wait finds that there is no further batch.
    assert ranges(config, stage) == Counter({**dict.fromkeys(SHARED | {loss}, 2), "anomem.batch": 3})


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradients_reach_the_encoder_in_the_layout_of_its_maps(
    tiny: TrainConfig, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another one batch norm's backward pass copies them or is slow."""
    formats: list[bool] = []
    batch_norm = layers.batch_norm

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        out = batch_norm(*args, **options)
        if out.requires_grad:
            out.register_hook(lambda g: formats.append(g.is_contiguous(memory_format=torch.channels_last)))
        return out

    monkeypatch.setattr(layers, "batch_norm", noted)
    config = replace(
        tiny,
        model=replace(tiny.model, impl=impl),
        optimizer=replace(tiny.optimizer, steps=1, warmup=0),
        run=replace(tiny.run, memory_format="channels_last"),
    )
    task = load_task(config.data)
    train_stage1(model_for(config, task), task.train, None, config, quiet=True)
    assert len(formats) > 3
    assert all(formats)


def rows_of(setting: str, score: str) -> list[dict[str, Any]]:
    """The rows of digits in one setting; of rows for the same run, the last."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if (r["dataset"], r["setting"], r["score"]) == ("digits", setting, score)]
    return list({(r["normal"], r["seed"]): r for r in rows}.values())


@pytest.mark.parametrize(
    ("module", "setting", "scores"),
    [(stage1, "one-class", ("detector", "plain")), (stage2, "outlier exposure", ("stage2",))],
)
def test_the_figures_of_a_header_are_those_of_the_rows(module: Any, setting: str, scores: tuple[str, ...]) -> None:
    header = " ".join(module.__doc__.split())
    for score in scores:
        rows = rows_of(setting, score)
        seeds = {row["seed"] for row in rows}
        means = [mean(row["auroc"] for row in rows if row["seed"] == seed) for seed in seeds]
        assert f"{mean(means):.3f} ± {stdev(means):.3f}" in header
        assert f"{median(row['seconds'] for row in rows):.1f} s with fitting" in header
        assert f"median of {len(rows)} runs" in header
        assert "two seeds" in header
        assert len(seeds) == 2
        assert {row["threads"] for row in rows} == {1}
        assert {re.match(r"[\d.]+", row["torch"])[0] for row in rows} == {"2.14.1"}  # type: ignore[index]
    assert not torch.cuda.is_available() or "not measured on a GPU yet" in header
