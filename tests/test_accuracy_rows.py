"""Rows and tables of `benchmarks.accuracy`: the last row counts, complete seeds are averaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.__main__ import digest, scores_of
from benchmarks.accuracy.settings import Job, jobs
from benchmarks.harness import rows
from benchmarks.harness.rows import Score
from benchmarks.report.accuracy import GOALS, GROUPS, precision, seeds_of

JOB = Job("digits", "3", "classes", 0, "one-class")


def row(normal: str, auroc: float, seed: int = 0) -> Score:
    (made,) = scores_of(replace(JOB, normal=normal, seed=seed), {"detector": {"auroc": auroc}}, 1.0)
    return made


def test_rows_survive_the_file_and_the_last_counts(tmp_path: Path) -> None:
    file = tmp_path / "new" / "accuracy.jsonl"
    assert rows.read(file, Score) == []
    rows.append(file, row("3", 0.5), row("8", 0.6))
    rows.append(file, row("3", 0.7))
    assert rows.read(file, Score) == [row("3", 0.7), row("8", 0.6)]


def test_only_seeds_with_every_class_are_averaged() -> None:
    found = [row("3", 0.9), row("8", 0.8), row("9", 0.7), row("3", 0.6, seed=1)]
    assert seeds_of(found, GROUPS[0], "one-class", "detector") == {0: [0.9, 0.8, 0.7]}
    assert seeds_of(found, GROUPS[0], "one-class", "plain") == {}


def test_a_digest_follows_what_is_run() -> None:
    settings = ("one-class", "untrained", "synthetic outliers", "outlier exposure")
    digests = {name: digest(replace(JOB, setting=name)) for name in settings}
    assert digests["one-class"] == digests["untrained"]  # one configuration, measured in two ways
    assert len(set(digests.values())) == 3
    assert digest(JOB) != digest(replace(JOB, seed=1))


def test_every_goal_is_among_the_jobs() -> None:
    planned = {(job.dataset, job.normal, job.anomalies, job.setting) for job in jobs()}
    for group, setting, _, _ in GOALS:
        assert {(group.dataset, normal, group.anomalies, setting) for normal in group.normals} <= planned


def test_precisions_are_compared_over_pairs_of_the_same_class_and_seed(tmp_path: Path) -> None:
    whole, half = {"3": 0.8, "8": 0.9, "9": 0.1}, {"3": 0.9, "8": 0.96}
    measured = [
        (normal, name, x) for name, found in (("float32", whole), ("bf16", half)) for normal, x in found.items()
    ]
    for normal, setting, auroc in measured:
        job = replace(JOB, normal=normal, setting=f"one-class, {setting}")
        scores = {score: {"auroc": auroc} for score in ("detector", "plain")}
        rows.append(tmp_path / "precision.jsonl", *scores_of(job, scores, 1.0))
    *_, line = precision(tmp_path).splitlines()
    assert line == "| plain | seed 0: 2 | 0.8500 | 0.9300 | +0.0800 | 0.0200 |"  # 9 has one precision only
