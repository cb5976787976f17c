"""Rows: one JSON object a line for each score of each job, so that a run can be stopped and taken up again."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from anomem.evaluate.report import Metrics
from anomem.train.config import to_dict
from benchmarks.accuracy.tasks import Job

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy.jsonl"


@dataclass
class Row:
    """One score of one job."""

    dataset: str
    normal: str
    anomalies: str
    seed: int
    setting: str
    score: str
    auroc: float | None
    """Of test images."""
    pixel_auroc: float | None
    """Of test pixels, where there are masks and the score has maps."""
    seconds: float
    """Of the whole job: training, fitting, scoring."""
    config: str
    """Digest of the configuration: a changed preset is another job."""
    commit: str
    dirty: bool
    """Whether files outside of benchmarks/results differed from the commit."""
    torch: str
    processor: str
    threads: int


def digest(job: Job) -> str:
    """Equal for equal configurations; the settings of a second stage that does not run do not count."""
    values = to_dict(job.config)
    if not job.config.has_stage2:
        del values["stage2"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def rows_of(job: Job, metrics: Metrics, seconds: float) -> list[Row]:
    """The rows of a job that is done.

    Args:
        job: what was measured.
        metrics: score -> measure -> number.
        seconds: it took.
    """
    about = {
        "config": digest(job),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
    return [
        Row(
            **asdict(job),
            score=score,
            auroc=measures.get("auroc"),
            pixel_auroc=measures.get("pixel_auroc"),
            seconds=round(seconds, 1),
            **about,  # type: ignore[arg-type]
        )
        for score, measures in metrics.items()
    ]


def append(path: Path, rows: list[Row]) -> None:
    """Add rows to a file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read(path: Path) -> list[Row]:
    """The rows of a file; of rows for the same score of the same job, the last."""
    if not path.exists():
        return []
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({(r.dataset, r.normal, r.anomalies, r.seed, r.setting, r.score): r for r in rows}.values())


def _git(*arguments: str) -> str:
    """Output of a git command in the project, "" where there is no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
