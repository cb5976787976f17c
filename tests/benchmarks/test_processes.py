"""The benchmark of several processes: it starts both jobs and writes a row of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import rows
from benchmarks.harness.rows import Step
from benchmarks.processes import PROCESSES, THREADS, Options, main


def test_both_jobs_train_and_write_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert main(Options(batch=4, side=16, batch_norm="process", steps=1, rounds=1, json=path)) == 0
    found = rows.read(path, Step)
    assert [row.pipeline for row in found] == [PROCESSES, THREADS]
    for row in found:
        assert row.title == "Stage 1, small, B = 4, 16×16 pixels, batch norm of each process"
        assert row.config["batch_norm"] == "process"
        assert row.config["processes"] == row.about["threads"] == 2
        assert (row.config["backbone"], row.config["batch"]) == ("small", 4)
        assert row.config["precision"] in ("bf16", "float32")
        assert row.seconds_per_step > 0
        assert row.images_per_second == pytest.approx(4 / row.seconds_per_step)
        assert row.others is not None
        assert row.others >= 0
