"""Where the time of a training step goes: the phases of the real loop, and a trace of it."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from anomem.data import Task, load_task
from anomem.files import make_folder, write_atomically
from anomem.models import Encoder
from anomem.train.config import TrainConfig, flat_settings
from anomem.train.execution import settled
from anomem.train.ranks import joined
from anomem.train.run import model_for, prepared, require_batches
from anomem.train.rundir import default_directory
from anomem.train.stage1 import train_stage1
from anomem.validation import require_count

RANGES = "anomem."
"""First part of the names of the loop's ranges; the rest is the phase."""
LAST = "optimizer"
"""The phase that ends a step."""
WARMUP = 3
"""Steps before those that are profiled."""


class Event(NamedTuple):
    """One event of a profile on the host's side; times in microseconds."""

    name: str
    start: float
    end: float
    on_gpu: float = 0.0
    """Time of the kernels and copies that it launched itself."""

    @classmethod
    def of(cls, event: Any) -> Event:
        """From an event of `torch.profiler`, which lists a range's copy on the GPU among its kernels."""
        kernels = (kernel.duration for kernel in event.kernels if not kernel.name.startswith(RANGES))
        return cls(event.name, event.time_range.start, event.time_range.end, sum(kernels))


def seconds_of_phases(events: Sequence[Event], warmup: int, steps: int, *, on_gpu: bool) -> dict[str, float]:
    """Seconds of each of the loop's ranges in one step.

    On a CPU the time of the range. On a GPU the time of the kernels and copies launched during the range by any thread,
    because autograd launches the backward pass from its own thread.

    Args:
        events: of a profile of the loop.
        warmup: steps not counted, at least 1.
        steps: counted after them.
        on_gpu: whether the time is the GPU's.

    Returns:
        Phase -> seconds, in the order of a step.
    """
    ranges = sorted((event for event in events if event.name.startswith(RANGES)), key=lambda event: event.start)
    ends = [one.end for one in ranges if one.name == RANGES + LAST]
    ranges = [one for one in ranges if ends[warmup - 1] <= one.start < ends[warmup + steps - 1]]
    microseconds = dict.fromkeys((one.name for one in ranges), 0.0)
    for one in ranges:
        inside = (event.on_gpu for event in events if one.start <= event.start < one.end) if on_gpu else ()
        microseconds[one.name] += sum(inside) if on_gpu else one.end - one.start
    return {name.removeprefix(RANGES): total / steps / 1e6 for name, total in microseconds.items()}


class Profile(NamedTuple):
    """Of some steps of stage 1."""

    phases: dict[str, float]
    """Phase -> seconds of a step, with the profiler running."""
    seconds: float
    """Of a step, likewise; on a GPU more than the sum of its phases where it waits for the host."""
    images: int
    """Of a step, in all processes."""
    trace: Path
    """Chrome trace, for https://ui.perfetto.dev."""
    setting: str
    """Precision, layout and batch, in words."""

    def table(self) -> str:
        """The setting, the phases and the total, as lines of text."""
        width = max(len(name) for name in (*self.phases, "step"))
        lines = [
            f"{name:<{width}} {1e3 * seconds:>9.2f} ms {seconds / self.seconds:>6.1%}"
            for name, seconds in self.phases.items()
        ]
        lines.append(f"{'step':<{width}} {1e3 * self.seconds:>9.2f} ms {self.images / self.seconds:>8.0f} images/s")
        return "\n".join([self.setting, *lines])


def profile_steps(
    config: TrainConfig, steps: int, *, task: Task | None = None, encoder: Encoder | None = None
) -> Profile | None:
    """Profile the loop of stage 1; nothing is kept but the trace, beside where the run directory would be.

    Of several processes the first keeps its trace. All of them are profiled, so that none waits for a slower one.

    Args:
        config: of the run.
        steps: profiled, after a few that are not.
        task: as for `train`.
        encoder: as for `train`.

    Returns:
        The profile of the first process; None in the others.

    Raises:
        UserError: as `train`.
    """
    require_count(steps, "profile", 1)
    with prepared(config), joined(config.run.device) as ranks:
        task = task or load_task(config.data)
        model = model_for(config, task, encoder)
        task = task.to(model.device)
        config = settled(config, model.device)
        ranks.require_same(flat_settings(config))
        require_batches(config, len(task.train), ranks)
        # One step more, whose batch is asked for when the last profiled step has ended.
        optimizer = replace(config.optimizer, steps=WARMUP + steps + 1)
        config = replace(config, optimizer=optimizer, run=replace(config.run, log_every=10**9, cuda_graph=False))
        is_normal = None if bool(task.train_is_normal.all()) else task.train_is_normal
        on_gpu = model.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        # Read at the first profile; without it the profiler reports each start and stop, and a missing GPU, as errors.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(activities=activities) as profiler:
            train_stage1(model, task.train, is_normal, config, quiet=True)
        if not ranks.first:
            return None
    events = [Event.of(event) for event in profiler.events() or ()]
    ends = sorted(event.end for event in events if event.name == RANGES + LAST)
    trace = Path(f"{config.run.directory or default_directory(config)}-trace.json.gz")
    make_folder(trace.parent)
    with tempfile.TemporaryDirectory(prefix="anomem-") as scratch:
        profiler.export_chrome_trace(f"{scratch}/trace.json")
        write_atomically(trace, gzip.compress(Path(scratch, "trace.json").read_bytes()))
    phases = seconds_of_phases(events, WARMUP, steps, on_gpu=on_gpu)
    images = min(config.optimizer.batch_size, len(task.train))
    micro = config.optimizer.micro_batch
    parts = f"batch of {images}" + ("" if micro is None else f" in micro-batches of {micro}")
    setting = ", ".join([config.run.precision, config.run.memory_format, parts])
    return Profile(phases, (ends[WARMUP + steps - 1] - ends[WARMUP - 1]) / steps / 1e6, images, trace, setting)
