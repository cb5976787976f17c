"""Progress of a running stage: log rows, TensorBoard, and the live display on a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anomem.errors import UserError
from anomem.files import writing
from anomem.train.config import RunConfig
from anomem.train.ranks import ONE, Ranks
from anomem.train.rundir import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console, Group

Values = Mapping[str, Tensor]
"""Name -> 0-dim tensor. Names are "loss" or "term/scale", as TensorBoard groups them."""


class _Late:
    """Numbers on their way from the device: the copy is queued now and awaited when they are read.

    Args:
        values: [n] on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self.copied: torch.cuda.Event | None = None
        self.host = values
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(values.device))

    @property
    def ready(self) -> bool:
        """Whether reading them waits for nothing."""
        return self.copied is None or self.copied.query()

    def read(self) -> list[float]:
        """The numbers."""
        if self.copied is not None:
            self.copied.synchronize()
        numbers: list[float] = self.host.tolist()
        return numbers


class Monitor:
    """Logs one stage. The host reads the values of a row when they have arrived, so that logging never waits.

    The first step is shown as soon as it is done, with the expected time; only there the host waits for the device.

    Args:
        run: its log gets the rows; None writes no log.
        stage: "stage1" or "stage2".
        start: step the stage begins at.
        steps: step it ends at.
        config: steps between rows (the last step has one too), and whether to write TensorBoard files.
        quiet: show nothing.
        ranks: the processes; the first one logs and shows the means over all of them.

    Raises:
        UserError: a loss is not finite, or TensorBoard is configured and not installed.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        stage: str,
        start: int,
        steps: int,
        config: RunConfig,
        *,
        quiet: bool = False,
        ranks: Ranks = ONE,
    ) -> None:
        self.ranks = ranks
        self.loud = not quiet  # in all processes alike: they log after the same steps
        run, quiet = (run, quiet) if ranks.first else (None, True)
        self.run, self.stage, self.start, self.steps, self.every = run, stage, start, steps, config.log_every
        self.quiet = quiet
        self.pending: tuple[dict[str, Any], tuple[str, ...], _Late] | None = None
        self.estimated = False
        self.images = 0
        self.began = self.last = time.perf_counter()
        self.writer = None
        if config.tensorboard and run is not None:
            with writing(run.tensorboard):
                self.writer = tensorboard_writer()(str(run.tensorboard))
        if run is not None and start < steps:  # after a complete stage come the rows of the next one: keep those
            run.keep_rows(stage, start)
        self.display = None if quiet or not sys.stdout.isatty() else Display(stage, start, steps)

    def __enter__(self) -> Monitor:
        if self.display is not None:
            self.display.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            if self.display is not None:
                with suppress(OSError):
                    self.display.live.stop()
            if self.writer is not None:
                self.writer.close()

    def due(self, step: int, images: int) -> bool:
        """Count a step as done; True when a row is due, or when the first step is to be shown.

        Args:
            step: 0 … steps − 1.
            images: training images in its batch, of all processes.
        """
        self.images += images
        if self.pending is not None and self.pending[2].ready:
            self.flush()
        if self.display is not None:
            self.display.update(step + 1)
        return self._has_row(step + 1) or (step == self.start and self.loud)

    def _has_row(self, done: int) -> bool:
        """Whether the log gets a row after so many steps; the same in a resumed run."""
        return done % self.every == 0 or done == self.steps

    def log(self, step: int, rate: float, values: Values) -> None:
        """Queue the copy of a row's values to the host; they are read when they have arrived.

        Args:
            step: 0 … steps − 1.
            rate: its learning rate.
            values: to log.
        """
        self.flush()
        now = time.perf_counter()
        row = {
            "stage": self.stage,
            "step": step + 1,
            "seconds": round(now - self.began, 3),
            "learning_rate": rate,
            "images_per_second": round(self.images / max(now - self.last, 1e-9), 1),
        }
        numbers = self.ranks.mean(torch.stack([value.detach().float() for value in values.values()]))
        self.pending = (row, tuple(values), _Late(numbers))
        self.images, self.last = 0, now
        if self.pending[2].ready or step == self.start:
            self.flush()

    def flush(self) -> None:
        """Read the values of the pending row and write it."""
        if self.pending is None:
            return
        row, names, late = self.pending
        self.pending = None
        values = dict(zip(names, late.read(), strict=True))
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"{self.stage}: the loss is not finite at step {row['step']} ({values['loss']}); check the images, "
                f"or lower --{'stage2.' if self.stage == 'stage2' else ''}optimizer.learning-rate"
            )
        if self.run is not None and self._has_row(row["step"]):
            self.run.add_row({**row, **values})
        if self.writer is not None and self._has_row(row["step"]):
            for name, value in {**values, "learning_rate": row["learning_rate"]}.items():
                self.writer.add_scalar(f"{self.stage}/{name}", value, row["step"])
        try:
            self._show(row, values)
        except OSError:  # the terminal or the reader has gone: the training goes on, its log is in the run directory
            self.quiet, self.display = True, None

    def _show(self, row: Mapping[str, Any], values: Mapping[str, float]) -> None:
        terms = by_name(values)
        speed = f"{row['images_per_second']:.0f} images/s"
        remaining = row["seconds"] / max(row["step"] - self.start, 1) * (self.steps - row["step"])
        if self.display is not None:
            self.display.terms = {name: numbers for name, numbers in terms.items() if name != "loss"}
            self.display.update(loss=f"loss {values['loss']:.3g}", speed=speed)
            if not self.estimated and remaining >= 60:
                self.display.live.console.print(f"{self.stage}: {self.steps} steps, about {duration(remaining)}")
        elif not self.quiet:
            line = "  ".join(
                f"{name} {' '.join(f'{v:.3g}' for v in numbers.values())}" for name, numbers in terms.items()
            )
            left = f"{'' if self.estimated else 'about '}{duration(remaining)} left"
            print(f"{self.stage} {row['step']}/{self.steps}  {line}  {speed}  {left}", flush=True)
        self.estimated = True


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Display:
    """A bar with loss, speed and time left; below it a table of the loss terms, one column per scale.

    Args:
        stage: its name.
        start: steps done.
        steps: of the stage.
        console: to draw on; standard output when None.
    """

    def __init__(self, stage: str, start: int, steps: int, console: Console | None = None) -> None:
        # Here only: a training loop without a terminal does not need rich.
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.terms: dict[str, dict[str, float]] = {}  # name -> scale -> value
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.task = self.bar.add_task(stage, total=steps, completed=start, loss="", speed="")
        self.live = Live(
            console=console or Console(soft_wrap=True), refresh_per_second=10, get_renderable=self._renderable
        )

    def update(self, completed: int | None = None, **fields: Any) -> None:
        """Set the number of steps done, or the fields `loss` and `speed`."""
        self.bar.update(self.task, completed=completed, **fields)

    def _renderable(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        if not self.terms:
            return Group(self.bar)
        table = Table(box=None, pad_edge=False)
        for heading in ("", *next(iter(self.terms.values()))):
            table.add_column(heading, justify="right" if heading else "left")
        for name, numbers in self.terms.items():
            table.add_row(name, *(f"{number:.3g}" for number in numbers.values()))
        return Group(self.bar, table)


def by_name(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Values grouped by name, then scale: {"loss": {"": 9.1}, "contrast": {"block1": 2.1, "block2": 1.9}}."""
    grouped: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        name, _, scale = key.partition("/")
        grouped.setdefault(name, {})[scale] = value
    return grouped


def tensorboard_writer() -> Any:
    """The class that writes TensorBoard files.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"TensorBoard logs need the package tensorboard, which cannot be imported ({error}); install it, or leave "
            "out --run.tensorboard"
        ) from error
    return SummaryWriter
