"""`python -m benchmarks.processes`: throughput of a training by several gloo processes against one process.

Both run the training loop, `anomem.train.stage1.train_stage1`, with the same joined batch on as many cores: W processes
of one thread each, started by torchrun, and one process of W threads. They take turns. Wall time: a machine with other
work on it measures nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro

from anomem.data import ResidentImages
from anomem.train.config import BatchNormOver
from anomem.train.execution import settled
from anomem.train.ranks import joined
from benchmarks.harness import rows
from benchmarks.harness.console import say
from benchmarks.harness.rows import Step
from benchmarks.profile_training import Pipeline, config_of, random_images

PROCESSES, THREADS = "processes of one thread", "one process of as many threads"


@dataclass(frozen=True)
class Options:
    """What is trained, and by how many processes."""

    batch: int = 128
    """B of all processes together."""
    side: int = 32
    """Pixels of an image's side; the images are random."""
    backbone: str = "small"
    """Encoder."""
    batch_norm: BatchNormOver = "job"
    """Whose batch the processes normalise by: that of the job, or each its own share."""
    processes: int = 2
    """W, at most as many as there are cores."""
    steps: int = 10
    """Steps measured in a round."""
    rounds: int = 5
    """Times that both take turns; the median counts."""
    json: Path = rows.RESULTS / "cpu-processes.jsonl"
    """File of rows."""
    child: bool = False
    """One of the processes that are measured: trains and prints its seconds."""


def main(options: Options) -> int:
    """Measure both in turns and write a row of each."""
    if options.child:
        return train(options)
    count = options.processes
    commands = {
        PROCESSES: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)],
        THREADS: [],
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, launcher in commands.items():
            found[name].append(seconds_of(launcher, 1 if name == PROCESSES else count, options))
    norms = "" if options.batch_norm == "job" else ", batch norm of each process"
    title = f"Stage 1, {options.backbone}, B = {options.batch}, {options.side}×{options.side} pixels{norms}"
    about = {**rows.about("cpu"), "threads": count}
    config = config_of(options.backbone, "auto", options.batch, "cpu")
    precision = settled(config, torch.device("cpu")).run.precision
    measured = [
        Step(
            pipeline=name,
            title=title,
            config={
                "processes": count,
                "backbone": options.backbone,
                "batch": options.batch,
                "precision": precision,
                "batch_norm": options.batch_norm,
            },
            about=about,
            seconds_per_step=(seconds := median(turn["seconds"] for turn in turns)),
            milliseconds={},
            peak_bytes=0,
            images_per_second=options.batch / seconds,
            others=max(turn["others"] for turn in turns),
        )
        for name, turns in found.items()
    ]
    kept = [row for row in rows.read(options.json, Step) if row.title != title]
    rows.write(options.json, [*kept, *measured])
    for row in measured:
        say(f"{title}: {row.images_per_second:.0f} images/s by {row.pipeline}, others {row.others} cores")
    return 0


def seconds_of(launcher: list[str], threads: int, options: Options) -> dict[str, float]:
    """One turn in processes of its own: seconds of a step, and cores that others used meanwhile."""
    arguments = (
        f"--batch {options.batch} --side {options.side} --backbone {options.backbone} --processes {options.processes} "
        f"--batch-norm {options.batch_norm} --steps {options.steps} --child"
    )
    command = [sys.executable, *launcher, "-m", "benchmarks.processes", *arguments.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    ended = subprocess.run(command, env=environment, cwd=rows.ROOT, check=True, text=True, stdout=subprocess.PIPE)
    answer: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def train(options: Options) -> int:
    """In a process that is measured: run the loop; the first one prints a line of JSON."""
    with joined("cpu") as ranks:
        images = ResidentImages(random_images((options.steps + 6) * options.batch, options.side))
        config = config_of(options.backbone, "auto", options.batch, "cpu")
        run = replace(config.run, threads=torch.get_num_threads(), batch_norm=options.batch_norm)
        config = replace(config, run=run)
        with rows.Others() as others:
            stamped = Pipeline("", config, images, warmup=3).train(options.steps)
        ranks.wait()
        if ranks.first:
            # The other processes of this job count as others.
            ours = ranks.count - 1
            seconds = (stamped.times[1] - stamped.times[0]) / options.steps
            print(json.dumps({"seconds": seconds, "others": max(0.0, (others.cores or 0.0) - ours)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.processes", description=__doc__)))
