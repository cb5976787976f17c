"""`python -m benchmarks.profile_training`: where the time of a training step goes, against plain PyTorch.

Three pipelines train the same model on the same images: stage 1 with every operator in eager PyTorch (`reference`),
stage 1 as this library runs it, and the pipeline that is usually written (per-image torchvision transforms in
`DataLoader` workers, eager loss in float32). Writes a row for each, a Chrome trace for each and a picture of the bars.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from anomem.models import AnoMem, ModelConfig, build_model
from benchmarks.console import has, parse, say, table
from benchmarks.machine import ROOT, about
from benchmarks.memory import peak_bytes
from benchmarks.report.tables import number
from benchmarks.training.phases import Phases
from benchmarks.training.pipelines import Batched, PerImage, random_images
from benchmarks.training.step import Step

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
    """Steps measured."""
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
    images = random_images(8 * batch, options.side)
    config = {"backbone": backbone, "batch": batch, "side": options.side, "bf16": bf16, "workers": options.workers}
    title = (
        f"Stage 1, {backbone}, B = {batch}, {options.side}×{options.side} pixels, {'bfloat16' if bf16 else 'float32'}"
    )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    bars = [("eager", "reference", False), (f"anomem ({options.impl})", options.impl, False)]
    if has("torchvision"):
        bars.append((f"usual pipeline, {options.workers} workers", "reference", True))
    else:
        say("torchvision is not installed: the usual pipeline has no bar")
    for name, impl, usual in bars:
        say(f"{name}: {options.warmup} + {2 * options.steps} steps")
        step = Step(model_for(backbone, impl, options.side, device), device, bf16=bf16, loss_in_float32=usual)
        source = PerImage(images, batch, device, options.workers) if usual else Batched(images, batch, device)
        measured = measure(step, source, options, out / f"{device}-{name.split(' ')[0]}.json.gz")
        row = {"pipeline": name, "title": title, "config": config, **measured, "about": about(device)}
        row["images_per_second"] = batch / measured["seconds_per_step"]
        found.append(row)
        del step, source
        gc.collect()
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


def measure(step: Step, source: Batched | PerImage, options: Options, trace: Path) -> dict[str, Any]:
    """Throughput without phases, then phases, peak memory and a trace of one step.

    Args:
        step: the gradient step.
        source: of the views.
        options: numbers of steps.
        trace: file of the Chrome trace.

    Returns:
        seconds_per_step, milliseconds by phase, peak_bytes of a step.
    """
    device = step.device
    quiet, timed = Phases(device, timed=False), Phases(device, timed=True)
    for views in itertools.islice(source.views(quiet), options.warmup):
        step(views, quiet)
    wait(device)
    start = time.perf_counter()
    for views in itertools.islice(source.views(quiet), options.steps):
        step(views, quiet)
    wait(device)
    seconds = (time.perf_counter() - start) / options.steps
    for views in itertools.islice(source.views(timed), options.steps):
        step(views, timed)
        timed.end_of_step()
    views = next(source.views(quiet))
    peak = peak_bytes(lambda: step(views, quiet), device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step(next(source.views(quiet)), quiet)
        wait(device)
    profiler.export_chrome_trace(str(trace))
    return {"seconds_per_step": seconds, "milliseconds": timed.milliseconds(), "peak_bytes": peak}


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
