"""`python -m benchmarks.profile_training`: where the time of a training step goes, against plain PyTorch.

Three pipelines train the same model on the same images: stage 1 with every operator in eager PyTorch (`reference`),
stage 1 as this library runs it, and the pipeline that is usually written (per-image torchvision transforms in
`DataLoader` workers, eager loss in float32). Writes a row for each, a Chrome trace for each and a picture of the bars.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from anomem.models import AnoMem, ModelConfig, build_model
from benchmarks.console import has, parse, say, table
from benchmarks.machine import ROOT, Others, about
from benchmarks.memory import peak_bytes
from benchmarks.report.tables import number
from benchmarks.training.phases import Phases
from benchmarks.training.pipelines import Batched, PerImage, random_images
from benchmarks.training.step import Step

ROUNDS = 5
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@dataclass(frozen=True)
class Options:
    """What is trained, and for how long."""

    device: Literal["cpu", "cuda"] | None = None
    """Where; a GPU where there is one."""
    backbone: Literal["small", "resnet18", "resnet50", "efficientnet_b0"] | None = None
    """Encoder; small on a CPU, resnet18 on a GPU when not given."""
    batch: int | None = None
    """B; 128 on a CPU, 1024 on a GPU when not given."""
    side: int = 32
    """Pixels of an image's side; the images are random."""
    impl: Literal["auto", "native", "triton"] = "auto"
    """Implementation of this library's bar."""
    steps: int = 10
    """Steps measured without phases, and as many with them."""
    warmup: int = 3
    """Steps before."""
    workers: int = 2
    """Processes of the usual pipeline."""
    bf16: bool | None = None
    """Encoder under bfloat16 autocast; on a GPU when not given."""
    json: str | None = None
    """File of rows; benchmarks/results/<device>-steps.jsonl when not given."""
    out: str = "runs/profile"
    """Folder of traces and of the picture."""


def main(options: Options) -> int:
    """Measure the three pipelines."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        say("--device cuda: torch finds no CUDA device here")
        return 2
    backbone = options.backbone or ("resnet18" if device == "cuda" else "small")
    batch = options.batch or (1024 if device == "cuda" else 128)
    bf16 = device == "cuda" if options.bf16 is None else options.bf16
    # More than the steps take: where an epoch ends, workers begin with empty queues, and a real one is far longer.
    images = random_images((options.warmup + 2 * options.steps + 8) * batch, options.side)
    config = {"backbone": backbone, "batch": batch, "side": options.side, "bf16": bf16, "workers": options.workers}
    title = (
        f"Stage 1, {backbone}, B = {batch}, {options.side}×{options.side} pixels, {'bfloat16' if bf16 else 'float32'}"
    )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    pipelines = [("eager", "reference", False), (f"anomem ({options.impl})", options.impl, False)]
    if has("torchvision"):
        pipelines.append((f"usual pipeline, {options.workers} workers", "reference", True))
    else:
        say("torchvision is not installed: the usual pipeline has no bar")
    bars: list[Bar] = []
    for name, impl, usual in pipelines:
        step = Step(model_for(backbone, impl, options.side, device), device, bf16=bf16, loss_in_float32=usual)
        source = PerImage(images, batch, device, options.workers) if usual else Batched(images, batch, device)
        bars.append(Bar(name, step, source))
    # Workers that fill their queues would take cores from another bar's steps: what has workers is measured alone.
    with_workers = [bar for bar in bars if isinstance(bar.source, PerImage)]
    found: list[dict[str, Any]] = []
    for together in ([bar for bar in bars if bar not in with_workers], with_workers):
        if together:
            say(f"{', '.join(bar.name for bar in together)}: {options.warmup} + {2 * options.steps} steps")
            with Others() as others:
                measure(together, options)
        for bar in together:
            row = {"pipeline": bar.name, "title": title, "config": config, "about": about(device)}
            row |= bar.result(out / f"{device}-{bar.name.split(' ')[0]}.json.gz")
            row["images_per_second"] = batch / row["seconds_per_step"]
            # Workers of the pipeline itself would count as others.
            row["others"] = None if bar in with_workers else others.cores
            found.append(row)
    path = Path(options.json) if options.json else ROOT / "benchmarks" / "results" / f"{device}-steps.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    show(title, found)
    say(f"rows in {path}, traces in {out}")
    if has("matplotlib"):
        from benchmarks.report import pictures

        pictures.bars(found, out / f"{device}-training.png")
    else:
        say("matplotlib is not installed: no picture")
    return 0


def model_for(backbone: str, impl: str, side: int, device: str) -> AnoMem:
    """The model of every bar: the same seed, the same weights."""
    config = ModelConfig(backbone=backbone, impl=impl)  # type: ignore[arg-type]
    return build_model(config, (side, side), 3, MEAN, STD).to(device).train()


class Bar:
    """One pipeline: its step, its views, and what was measured of it.

    Args:
        name: in tables and pictures.
        step: the gradient step.
        source: of the views.
    """

    def __init__(self, name: str, step: Step, source: Batched | PerImage) -> None:
        self.name = name
        self.step = step
        self.source = source
        self.phases = Phases(step.device, timed=False)
        self._views = source.views(self.phases)
        self.seconds: list[float] = []

    def run(self, steps: int, *, timed: bool) -> None:
        """Some steps, each phase of them timed or not."""
        self.phases.timed = timed
        for _ in range(steps):
            self.step(next(self._views), self.phases)
        if timed:
            self.phases.end_of_block(steps)

    def clock(self, steps: int) -> None:
        """Seconds of a step, from some of them without a wait in between."""
        wait(self.step.device)
        start = time.perf_counter()
        self.run(steps, timed=False)
        wait(self.step.device)
        self.seconds.append((time.perf_counter() - start) / steps)

    def result(self, trace: Path) -> dict[str, Any]:
        """What was measured, and with one more step each the peak memory and a Chrome trace in this file."""
        device = self.step.device
        self.phases.timed = False
        views = next(self._views)
        peak = peak_bytes(lambda: self.step(views, self.phases), device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        with profile(activities=activities) as profiler:
            self.run(1, timed=False)
            wait(device)
        profiler.export_chrome_trace(str(trace))
        return {
            "seconds_per_step": median(self.seconds),
            "milliseconds": self.phases.milliseconds(),
            "peak_bytes": peak,
        }


def measure(bars: list[Bar], options: Options) -> None:
    """Rounds of blocks: each pipeline a block without phases, by which it is judged, then one with them.

    A median over rounds, of both, survives a disturbance of the machine; figures of blocks that follow each other can
    be compared.
    """
    for bar in bars:
        bar.run(options.warmup, timed=False)
    block = max(1, options.steps // ROUNDS)
    for _ in range(ROUNDS):
        for bar in bars:
            bar.clock(block)
            bar.run(block, timed=True)


def wait(device: str) -> None:
    """Until the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def show(title: str, found: list[dict[str, Any]]) -> None:
    """The bars as a table: a line for each phase."""
    phases = list(dict.fromkeys(phase for row in found for phase in row["milliseconds"]))
    columns = ("ms of a step", *(row["pipeline"] for row in found))
    lines = [(phase, *(number(row["milliseconds"].get(phase, 0.0)) for row in found)) for phase in phases]
    lines.append(("sum of phases", *(number(sum(row["milliseconds"].values())) for row in found)))
    lines.append(("step without phases", *(number(1e3 * row["seconds_per_step"]) for row in found)))
    lines.append(("images/s", *(f"{row['images_per_second']:.0f}" for row in found)))
    lines.append(("peak MiB of forward, backward, update", *(f"{row['peak_bytes'] / 2**20:.1f}" for row in found)))
    table(title, columns, lines)


if __name__ == "__main__":
    sys.exit(main(parse(Options, __doc__ or "")))
