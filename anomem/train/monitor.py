"""What a person sees of a running stage: progress, log rows, TensorBoard."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from anomem.errors import UserError
from anomem.files import writing
from anomem.train.config import RunConfig
from anomem.train.display import Display, by_name
from anomem.train.rundir import RunDirectory
from anomem.validation import require_count

Values = Mapping[str, Tensor]
"""Name -> 0-dim tensor. Names are "loss" or "term/scale", as TensorBoard groups them."""


class _Late:
    """Numbers on their way from the device: the copy is queued now and waited for when it is read.

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

    def read(self) -> list[float]:
        """The numbers."""
        if self.copied is not None:
            self.copied.synchronize()
        numbers: list[float] = self.host.tolist()
        return numbers


class Monitor:
    """Logs one stage. Values stay on the device until the next row is due, so that logging never waits for it.

    Args:
        run: where rows go; None keeps no log.
        stage: "stage1" or "stage2".
        start: step the stage begins at.
        steps: step it ends at.
        config: steps between rows (the last step has one too), and whether to write TensorBoard files.
        quiet: show nothing.

    Raises:
        UserError: a loss is not finite (seen one row late), or TensorBoard is asked for and not installed.
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
    ) -> None:
        require_count(config.log_every, "run.log_every", 1)
        self.run, self.stage, self.start, self.steps, self.every = run, stage, start, steps, config.log_every
        self.quiet = quiet
        self.pending: tuple[dict[str, Any], tuple[str, ...], _Late] | None = None
        self.images = 0
        self.began = self.last = time.perf_counter()
        self.writer = _tensorboard(run) if config.tensorboard and run is not None else None
        if run is not None and start < steps:  # a stage that is complete has rows of later ones after its own
            run.keep_rows(stage, start)
        self.progress: Display | None = None
        if not quiet and sys.stdout.isatty():
            self.progress = Display()
            self.task = self.progress.add_task(stage, total=steps, completed=start, loss="", speed="")

    def __enter__(self) -> Monitor:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            if self.progress is not None:
                self.progress.stop()
            if self.writer is not None:
                self.writer.close()

    def due(self, step: int, images: int) -> bool:
        """Note that a step is done; tell whether a row is due.

        Args:
            step: 0 … steps − 1.
            images: training images in its batch.
        """
        self.images += images
        if self.progress is not None:
            self.progress.update(self.task, completed=step + 1)
        return (step + 1) % self.every == 0 or step + 1 == self.steps

    def log(self, step: int, rate: float, values: Values) -> None:
        """Take the values of a row; they are read when the next one is due.

        Args:
            step: 0 … steps − 1.
            rate: its learning rate.
            values: what to log.
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
        self.pending = (row, tuple(values), _Late(torch.stack([v.detach().float() for v in values.values()])))
        self.images, self.last = 0, now

    def flush(self) -> None:
        """Read and write the row whose values were left on the device when it was due."""
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
        if self.run is not None:
            self.run.add_row({**row, **values})
        if self.writer is not None:
            for name, value in {**values, "learning_rate": row["learning_rate"]}.items():
                self.writer.add_scalar(f"{self.stage}/{name}", value, row["step"])
        self._show(row, values)

    def _show(self, row: Mapping[str, Any], values: Mapping[str, float]) -> None:
        terms = by_name(values)
        speed = f"{row['images_per_second']:.0f} images/s"
        if self.progress is not None:
            self.progress.terms = {name: numbers for name, numbers in terms.items() if name != "loss"}
            self.progress.update(self.task, loss=f"loss {values['loss']:.3g}", speed=speed)
        elif not self.quiet:
            done, left = row["step"] - self.start, self.steps - row["step"]
            remaining = row["seconds"] / max(done, 1) * left
            line = "  ".join(
                f"{name} {' '.join(f'{v:.3g}' for v in numbers.values())}" for name, numbers in terms.items()
            )
            print(f"{self.stage} {row['step']}/{self.steps}  {line}  {speed}  {remaining:.0f} s left", flush=True)


def _tensorboard(run: RunDirectory) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"TensorBoard logs need the package tensorboard, which cannot be imported ({error})") from error
    with writing(run.tensorboard):
        return SummaryWriter(str(run.tensorboard))
