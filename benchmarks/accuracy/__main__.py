"""Run what is missing, print the tables."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from anomem.data import load_task
from benchmarks.accuracy import rows, tables
from benchmarks.accuracy.settings import SETTINGS
from benchmarks.accuracy.tasks import jobs


@dataclass(frozen=True)
class Options:
    """Detection on real images by every score, control and baseline."""

    results: Path = rows.RESULTS
    """File of rows; jobs that it holds with the same configuration are not run again."""
    datasets: tuple[str, ...] = ("digits", "textures")
    """Which data sets."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Which settings."""
    again: bool = False
    """Run also what the file holds; the new rows count."""
    table_only: bool = False
    """Run nothing."""


def main(options: Options) -> None:
    """Run the jobs and print the tables."""
    done = {(r.dataset, r.normal, r.anomalies, r.seed, r.setting, r.config) for r in rows.read(options.results)}
    wanted = [job for job in jobs() if job.dataset in options.datasets and job.setting in options.settings]
    for job in wanted if not options.table_only else []:
        key = (job.dataset, job.normal, job.anomalies, job.seed, job.setting, rows.digest(job))
        if key in done and not options.again:
            continue
        began = time.perf_counter()
        config = job.config
        _, measure = SETTINGS[job.setting]
        metrics = measure(config, load_task(config.data))
        seconds = time.perf_counter() - began
        rows.append(options.results, rows.rows_of(job, metrics, seconds))
        print(f"{job.dataset} {job.normal} {job.anomalies} seed {job.seed}, {job.setting}: {seconds:.0f} s", flush=True)
    console = Console(width=None if sys.stdout.isatty() else 100)
    found = rows.read(options.results)
    for group in tables.GROUPS:
        console.print(tables.group_table(found, group))
    console.print(tables.goal_table(found))


if __name__ == "__main__":
    main(tyro.cli(Options, description=Options.__doc__))
