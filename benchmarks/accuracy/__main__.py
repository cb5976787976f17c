"""Runs the missing jobs and prints the tables."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.markdown import Markdown

from anomem.data import load_task
from anomem.evaluate.report import Metrics
from anomem.train.config import to_dict
from benchmarks.accuracy.settings import SETTINGS, Job, jobs
from benchmarks.harness import rows
from benchmarks.harness.rows import Score
from benchmarks.report.accuracy import ROWS, SECTIONS


@dataclass(frozen=True)
class Options:
    """Detection on real images by every score, control and baseline."""

    results: Path = rows.RESULTS
    """Folder of accuracy.jsonl; jobs that it holds with the same configuration are not run again."""
    datasets: tuple[str, ...] = ("digits", "textures")
    """Data sets to run."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Settings to run."""
    again: bool = False
    """Run also the jobs that the file holds; the new rows count."""
    table_only: bool = False
    """Run nothing."""


def main(options: Options) -> None:
    """Run the jobs and print the tables."""
    path = options.results / ROWS
    done = {(r.dataset, r.normal, r.anomalies, r.seed, r.setting, r.config) for r in rows.read(path, Score)}
    wanted = [job for job in jobs() if job.dataset in options.datasets and job.setting in options.settings]
    for job in wanted if not options.table_only else []:
        if (*asdict(job).values(), digest(job)) in done and not options.again:
            continue
        began = time.perf_counter()
        config = job.config
        _, measure = SETTINGS[job.setting]
        metrics = measure(config, load_task(config.data))
        seconds = time.perf_counter() - began
        rows.append(path, *scores_of(job, metrics, seconds))
        print(f"{job.dataset} {job.normal} {job.anomalies} seed {job.seed}, {job.setting}: {seconds:.0f} s", flush=True)
    console = Console()
    for name, section in SECTIONS.items():
        console.print(name, Markdown(section(options.results)))


def digest(job: Job) -> str:
    """Equal for equal configurations; the settings of a second stage that does not run do not count."""
    values = to_dict(job.config)
    if not job.config.has_stage2:
        del values["stage2"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def scores_of(job: Job, metrics: Metrics, seconds: float) -> list[Score]:
    """The rows of a finished job.

    Args:
        job: what was measured.
        metrics: score -> measure -> number.
        seconds: of the whole job.
    """
    about = rows.about("cpu")
    return [
        Score(
            **asdict(job),
            score=score,
            auroc=measures.get("auroc"),
            pixel_auroc=measures.get("pixel_auroc"),
            seconds=round(seconds, 1),
            config=digest(job),
            commit=about["commit"],
            dirty=about["dirty"],
            torch=about["torch"],
            processor=about["device_name"],
            threads=about["threads"],
        )
        for score, measures in metrics.items()
    ]


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.accuracy", description=Options.__doc__))
