"""`python -m benchmarks.profile_training`: where the time of a training step goes, against plain PyTorch.

Three pipelines run the training loop itself, `anomem.train.stage1.train_stage1`, on the same images with the same
settings: "eager" with every operator in plain PyTorch (impl="reference", noise by `torch.randn`), float32 and
contiguous, "anomem" as the library runs it, and the "usual pipeline", eager on views that `DataLoader` workers make
image by image with torchvision. Each has a process of its own, and they take turns. The phases are the loop's own
ranges for `torch.profiler`. Writes a row and a Chrome trace for each and a picture of the bars.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from anomem.augment import Augmentation, AugmentConfig
from anomem.data import Images, ResidentImages
from anomem.models import AnoMem, ModelConfig, build_model
from anomem.reference import augment, blur_radius
from anomem.train import OptimizerConfig, RunConfig, TrainConfig, execution, stage1
from anomem.train.batches import Batch
from anomem.train.execution import settled
from anomem.train.profiling import Event, seconds_of_phases
from anomem.train.rows import Draws, Rows
from benchmarks.harness import rows
from benchmarks.harness.console import say, table
from benchmarks.harness.measure import Ceilings, peak_bytes, product_flops
from benchmarks.harness.rows import Step
from benchmarks.report.tables import number

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@dataclass(frozen=True)
class Options:
    """What is trained, and for how long."""

    device: Literal["cpu", "cuda"] | None = None
    """A GPU if there is one, when not given."""
    backbone: Literal["small", "resnet18", "resnet50", "efficientnet_b0"] | None = None
    """Encoder; small on a CPU, resnet18 on a GPU when not given."""
    batch: int | None = None
    """B; 128 on a CPU, 1024 on a GPU when not given."""
    side: int = 32
    """Pixels of an image's side; the images are random."""
    impl: Literal["auto", "native", "triton"] = "auto"
    """Implementation of this library's bar."""
    steps: int = 10
    """Steps measured without the profiler, and as many with it."""
    warmup: int = 3
    """Steps before, each time the loop is started; at least 1."""
    rounds: int = 5
    """Times that pipelines take turns; the median counts."""
    workers: int = 2
    """Processes of the usual pipeline."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of this library's bar; the others are float32."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Likewise; the others are contiguous."""
    compiled: bool = False
    """A further bar: this library with `run.compile`, compiled during the warm-up."""
    json: str | None = None
    """File of rows; benchmarks/results/<device>-steps.jsonl when not given."""
    out: str = "runs/profile"
    """Folder of traces and of the picture."""


def main(options: Options) -> int:
    """Measure the pipelines."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        say("--device cuda: torch finds no CUDA device")
        return 2
    backbone = options.backbone or ("resnet18" if device == "cuda" else "small")
    batch = options.batch or (1024 if device == "cuda" else 128)
    settings = {"backbone": backbone, "batch": batch, "side": options.side, "workers": options.workers}
    title = f"Stage 1, {backbone}, B = {batch}, {options.side}×{options.side} pixels"
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    # More than a run of the loop takes: at the end of an epoch workers would start with empty queues.
    images = (options.warmup + options.steps + 3) * batch

    def recipe(
        name: str,
        impl: str,
        precision: str = "float32",
        memory_format: str = "contiguous",
        compiled: bool = False,
        workers: int | None = None,
    ) -> Recipe:
        config = config_of(backbone, impl, batch, device, precision, memory_format, compiled)
        return Recipe(name, config, images, options.side, options.warmup, workers)

    alternating = [
        recipe("eager", "reference"),
        recipe(f"anomem ({options.impl})", options.impl, options.precision, options.memory_format),
    ]
    if options.compiled:
        alternating.append(recipe("compiled", options.impl, options.precision, options.memory_format, compiled=True))
    last = recipe(f"usual pipeline, {options.workers} workers", "reference", workers=options.workers)
    # Workers that fill their queues would take cores from another pipeline's steps: measured alone, in one round.
    alone = [last] if options.workers else []
    alternating += [] if options.workers else [last]
    ceilings = Ceilings(device)
    found: list[Step] = []
    for group, rounds in ((alternating, options.rounds), (alone, 1)):
        if not group:
            continue
        say(", ".join(each.name for each in group))
        with ExitStack() as stack:
            apart = [stack.enter_context(Apart(each)) for each in group]
            for _ in range(rounds):
                for each in apart:
                    trace = out / f"{device}-{each.recipe.name.split(' ')[0]}.json.gz"
                    each.measure(max(1, options.steps // rounds), trace)
            for each in apart:
                results = each.results()
                executed = results.executed
                dtype = torch.bfloat16 if executed["precision"] == "bf16" else torch.float32
                found.append(
                    Step(
                        pipeline=each.recipe.name,
                        title=title,
                        config={**settings, **executed},
                        about=rows.about(device),
                        seconds_per_step=results.seconds,
                        # Of the workers nothing is known.
                        cpu_seconds_per_step=None if group is alone else results.cpu_seconds,
                        product_seconds=results.flops / ceilings.product(dtype),
                        milliseconds=results.milliseconds,
                        peak_bytes=results.peak_bytes,
                        images_per_second=batch / results.seconds,
                        # Workers of the pipeline itself would count as others.
                        others=None if group is alone else results.others,
                    )
                )
    path = Path(options.json) if options.json else rows.RESULTS / f"{device}-steps.jsonl"
    titles = {row.title for row in found}
    rows.write(path, [*(row for row in rows.read(path, Step) if row.title not in titles), *found])
    show(title, found)
    say(f"rows in {path}, traces in {out}")
    if importlib.util.find_spec("matplotlib") is None:
        say("matplotlib is not installed (pip install 'anomem[lab]'): no picture")
    else:
        from benchmarks.report import pictures

        pictures.bars(found, out / f"{device}-training.png")
    return 0


def config_of(
    backbone: str,
    impl: str,
    batch: int,
    device: str,
    precision: str = "auto",
    memory_format: str = "auto",
    compiled: bool = False,
) -> TrainConfig:
    """The settings of a pipeline: the library's defaults but for these."""
    run = RunConfig(device=device, precision=precision, memory_format=memory_format, compile=compiled, log_every=10**9)
    return TrainConfig(
        model=ModelConfig(backbone=backbone, impl=impl),
        optimizer=OptimizerConfig(batch_size=batch),
        run=run,
        prototypes_from="normal",  # the loop is started several times and would fill the memories each time
    )


def random_images(count: int, side: int) -> Tensor:
    """[count, 3, side, side] uint8; the time of a step does not depend on the pictures."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


class Pipeline:
    """A model, its images, and the measurements of the training loop on them.

    Args:
        name: in tables and pictures.
        config: of the loop, but for the number of steps.
        images: on the device.
        warmup: steps before those that are measured, at least 1.
    """

    def __init__(self, name: str, config: TrainConfig, images: Images, warmup: int) -> None:
        self.name = name
        self.config = config
        self.images = images
        self.warmup = max(1, warmup)
        self.device = config.run.device
        self.seconds: list[float] = []
        """Of a step, the mean of each round."""
        self.cpu_seconds: list[float] = []
        """Processor time of all threads of the process, likewise."""
        self.phases: list[dict[str, float]] = []
        """Seconds of each phase in a step, the mean of each round."""
        model: AnoMem = build_model(config.model, images.size, images.channels, MEAN, STD)
        self.model = model.to(self.device)

    def executed(self) -> dict[str, Any]:
        """Precision, memory format and compilation of the loop."""
        run = settled(self.config, torch.device(self.device)).run
        return {"precision": run.precision, "memory_format": run.memory_format, "compile": run.compile}

    def train(self, steps: int) -> StampedImages:
        """Run the loop; the set has the times at which its first measured step begins and its last one ends."""
        stamped = StampedImages(self.images, self.device, self.warmup, self.warmup + steps)
        # One step more, whose batch is asked for when the last measured step ends.
        optimizer = replace(self.config.optimizer, steps=self.warmup + steps + 1)
        config = replace(self.config, optimizer=optimizer)
        plain = self.config.model.impl == "reference"
        views = UsualViews if isinstance(self.images, UsualImages) else EagerViews if plain else stage1.Views
        keep = execution.keep_freed_memory
        with (
            mock.patch.object(stage1, "Views", views),
            # A training in plain PyTorch leaves the allocator as it is.
            mock.patch.object(execution, "keep_freed_memory", (lambda: None) if plain else keep),
        ):
            stage1.train_stage1(self.model, stamped, None, config, quiet=True)
        return stamped

    def measure(self, steps: int, trace: Path) -> None:
        """One round: the loop without the profiler, then with it; its trace goes to a file."""
        stamped = self.train(steps)
        for marks, into in ((stamped.times, self.seconds), (stamped.cpu_times, self.cpu_seconds)):
            into.append((marks[1] - marks[0]) / steps)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        with profile(activities=activities) as profiler:
            self.train(steps)
        profiler.export_chrome_trace(str(trace))
        events = [Event.of(event) for event in profiler.events() or ()]
        self.phases.append(seconds_of_phases(events, self.warmup, steps, on_gpu=self.device == "cuda"))

    def milliseconds(self) -> dict[str, float]:
        """Phase -> time in a step, the median over the rounds."""
        names = dict.fromkeys(name for phases in self.phases for name in phases)
        return {name: 1e3 * median(phases.get(name, 0.0) for phases in self.phases) for name in names}


class Recipe(NamedTuple):
    """How a pipeline is made in the process that measures it."""

    name: str
    config: TrainConfig
    images: int
    """Their number."""
    side: int
    warmup: int
    workers: int | None = None
    """Of the usual pipeline; None for images that are resident."""

    def made(self) -> Pipeline:
        """The pipeline, on random images."""
        pixels, device = random_images(self.images, self.side), self.config.run.device
        images = (
            ResidentImages(pixels.to(device)) if self.workers is None else UsualImages(pixels, device, self.workers)
        )
        return Pipeline(self.name, self.config, images, self.warmup)


class Results(NamedTuple):
    """Of all rounds of a pipeline: medians, and what it was."""

    seconds: float
    cpu_seconds: float
    milliseconds: dict[str, float]
    peak_bytes: int
    executed: dict[str, Any]
    others: float | None
    """Cores that other processes used, in the busiest round."""
    flops: int
    """Of the encoder's products in a step."""


class Apart:
    """A pipeline in a process of its own: what the library tells the allocator holds for a process.

    Args:
        recipe: of the pipeline.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.process = ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(recipe,))

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.shutdown()

    def measure(self, steps: int, trace: Path) -> None:
        """See `Pipeline.measure`."""
        self.process.submit(_measure, steps, trace).result()

    def results(self) -> Results:
        """Of the rounds so far."""
        return self.process.submit(_results).result()


_HERE: dict[str, Any] = {}
"""In the process of a pipeline: itself, and the cores that others used in each round."""


def _begin(recipe: Recipe) -> None:
    _HERE.update(pipeline=recipe.made(), others=[])


def _measure(steps: int, trace: Path) -> None:
    with rows.Others() as others:
        _HERE["pipeline"].measure(steps, trace)
    _HERE["others"].append(others.cores)


def _results() -> Results:
    pipeline: Pipeline = _HERE["pipeline"]
    return Results(
        median(pipeline.seconds),
        median(pipeline.cpu_seconds),
        pipeline.milliseconds(),
        peak_bytes(lambda: pipeline.train(1), pipeline.device),
        pipeline.executed(),
        max((cores for cores in _HERE["others"] if cores is not None), default=None),
        encoder_flops(pipeline),
    )


def encoder_flops(pipeline: Pipeline) -> int:
    """Of the products in both passes of the encoder over a batch's views, as the pipeline makes them after training."""
    run = settled(pipeline.config, torch.device(pipeline.device)).run
    shape = 2 * pipeline.config.optimizer.batch_size, pipeline.images.channels, *pipeline.images.size
    views = torch.rand(shape, device=pipeline.device).contiguous(memory_format=execution.layout_of(run))

    def both_passes() -> None:
        with execution.autocast(run, torch.device(pipeline.device)):
            torch.stack([feature_map.sum() for feature_map in pipeline.model(views)]).sum().backward()

    counted = product_flops(both_passes)
    pipeline.model.zero_grad()
    return counted


class StampedImages:
    """An image set that notes when two of its batches are asked for, with the device idle.

    Args:
        images: the set.
        device: "cpu" or "cuda".
        first: number of a batch, counted from 0.
        last: likewise.
    """

    def __init__(self, images: Images, device: str, first: int, last: int) -> None:
        self.images = images
        self.device = device
        self.stamps = {first, last}
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self.count = 0

    @property
    def channels(self) -> int:
        """C."""
        return self.images.channels

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.size

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> StampedImages:
        """The set itself: it is on its device."""
        return self

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `anomem.data.Images.batches`."""
        source = self.images.batches(order, batch_size)
        while True:
            if self.count in self.stamps:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                self.times.append(time.perf_counter())
                self.cpu_times.append(time.process_time())
            self.count += 1
            batch = next(source, None)
            if batch is None:
                return
            yield batch


def _with_noise(x: Tensor, most: float) -> Tensor:
    """Pixels with Gaussian noise of a random scale; a function that workers can import."""
    return (x + most * torch.rand(()) * torch.randn_like(x)).clamp(0, 1)


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """An image as two views by torchvision's transforms, with the ranges of `AugmentConfig`.

    Args:
        images: [N, C, H, W] uint8.
    """

    def __init__(self, images: Tensor) -> None:
        from torchvision.transforms import v2  # its import takes longer than torch's

        config = AugmentConfig()
        side = images.shape[-1]
        radius = min(max(1, round(3 * config.blur_sigma[1])), side - 1)
        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(side, scale=config.crop_area, ratio=config.crop_ratio, antialias=True),
                v2.RandomHorizontalFlip(config.flip),
                v2.RandomApply([v2.ColorJitter(config.brightness, config.contrast, config.saturation)], config.jitter),
                v2.ToDtype(torch.float32, scale=True),
                v2.RandomApply([v2.GaussianBlur(2 * radius + 1, config.blur_sigma)], config.blur),
                v2.Lambda(functools.partial(_with_noise, most=config.noise)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return self.transform(image), self.transform(image)


class UsualImages:
    """Images whose batches are already two views, made by `DataLoader` workers.

    Args:
        images: [N, C, H, W] uint8 on the CPU.
        device: "cpu" or "cuda".
        workers: processes; 0 augments in the training process.
    """

    def __init__(self, images: Tensor, device: str, workers: int) -> None:
        self.dataset = TwoViews(images)
        self.channels = images.shape[1]
        self.size = images.shape[2], images.shape[3]
        self.device = device
        self.workers = workers

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device | str) -> UsualImages:
        """The set itself: it is on its device."""
        return self

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Views [2b, C, H, W] in [0, 1], first views, then second, and the order [b]."""
        pinned = self.device == "cuda"
        loader = DataLoader(
            self.dataset, batch_size, sampler=order.tolist(), num_workers=self.workers, pin_memory=pinned
        )
        for pair, index in zip(loader, order.split(batch_size), strict=True):
            yield torch.cat(pair).to(self.device, non_blocking=True), index


class UsualViews:
    """Takes the place of `anomem.train.stage1.Views` when workers made the views.

    Args:
        config: not used.
        is_normal: None.
        draws: not used.
    """

    def __init__(self, config: TrainConfig, is_normal: None, draws: Draws) -> None:
        pass

    def __call__(self, batch: Batch, rows: Rows, count: int) -> tuple[Tensor, None]:
        """The views as they came."""
        return batch.images, None


class EagerViews(stage1.Views):
    """Takes the place of `anomem.train.stage1.Views` in the plain PyTorch pipeline; see `TorchNoise`."""

    def __init__(self, config: TrainConfig, is_normal: Tensor | None, draws: Draws) -> None:
        super().__init__(config, is_normal, draws)
        self.augmentation = TorchNoise(config.augment, "reference")


class TorchNoise(Augmentation):
    """The augmentation in plain PyTorch with the noise of `torch.randn`.

    The reference makes the numbers of the kernel with PyTorch's integer operators, which takes several times as long as
    `torch.randn`: that would slow the rival down.
    """

    @torch.no_grad()
    def apply(
        self,
        images: Tensor,
        uniform: Tensor,
        keys: Tensor,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """See `Augmentation.apply`."""
        height, width = images.shape[-2:]
        parameters = self.parameters(uniform, keys, height, width)
        radius = min(blur_radius(self.config.blur_sigma[1]), height - 1, width - 1)
        normal = torch.randn(len(keys), *images.shape[1:], device=images.device)
        return augment(images, parameters, self.config.padding, radius, normal).contiguous(memory_format=memory_format)


def show(title: str, found: list[Step]) -> None:
    """The pipelines as a table: a line for each phase."""
    phases = list(dict.fromkeys(phase for row in found for phase in row.milliseconds))
    columns = ("ms of a step", *(row.pipeline for row in found))
    lines = [(phase, *(number(row.milliseconds.get(phase, 0.0)) for row in found)) for phase in phases]
    lines.append(("sum of phases", *(number(sum(row.milliseconds.values())) for row in found)))
    lines.append(("step without the profiler", *(number(1e3 * row.seconds_per_step) for row in found)))
    lines.append(("processor time", *(number(1e3 * (row.cpu_seconds_per_step or 0)) for row in found)))
    lines.append(("images/s", *(f"{row.images_per_second:.0f}" for row in found)))
    lines.append(("peak MiB of the loop", *(f"{row.peak_bytes / 2**20:.1f}" for row in found)))
    table(title, columns, lines)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m benchmarks.profile_training", description=__doc__)))
