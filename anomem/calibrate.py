"""`python -m anomem.calibrate`: measures and checks the usual calls, and fills the file of this machine."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anomem import backends, choice, machine, measuring
from anomem.errors import UserError
from anomem.machine import Measured
from anomem.rules import Problem


def problems(device: str) -> list[tuple[Problem, bool]]:
    """The usual calls that neither committed rows nor the rules for small calls decide, with and without gradients."""
    return [call for call in _usual(device) if choice.is_large(call[0]) and not choice.is_covered(call[0])]


def _usual(device: str) -> Iterator[tuple[Problem, bool]]:
    """Calls of a training and of scoring, the most frequent first."""
    dtypes = (torch.float32, torch.bfloat16)
    more = 1 if device == "cpu" else 4
    for training in (True, False):
        for d in (128, 64, 256):
            for dtype in dtypes:
                make = partial(Problem, device=device, dtype=dtype, features=d)
                for groups, batch in ((8, 128), (8, 256), (16, 512), (4, 1024)):
                    yield make("nt_xent", rows=2 * batch, columns=2 * batch, groups=groups * more), training
                for rows, columns in ((1024, 64), (8192, 64), (8192, 512), (32768, 512), (8192, 2048)):
                    yield make("retrieve", rows=rows * more, columns=columns), training
                for rows in (512, 2048):
                    yield make("info_nce", rows=rows * more, columns=rows * more), training
                yield make("shrink", rows=8192 * more, columns=512), training
                yield make("gather", rows=128 * more, columns=256, groups=64), training
                yield make("variance", rows=128 * more, groups=64), training
                yield make("batch_norm", rows=2**17 * more), training
                if training or dtype == torch.float32:  # in bfloat16 the forward pass is plain PyTorch
                    yield make("conv3x3", rows=2**14 * more, columns=d), training
                if training:
                    yield make("downsample", rows=2**17 * more), training
                else:
                    yield make("deviation_map", rows=8192 * more, columns=512), training
                    yield make("usage", rows=8192 * more, columns=512), training
                    yield make("nearest", rows=8192 * more, columns=1024), training
                    yield make("read", rows=8192 * more, columns=1024), training
        if not training:
            yield Problem("augment", device, torch.uint8, features=3 * 64 * 64, rows=128 * more), training


def fill(device: str, place: Path, seconds: float, report: Callable[[float, str], object]) -> dict[str, Measured]:
    """Check and measure the usual calls and write the outcomes into a file, also those before an interruption.

    Args:
        device: "cpu" or "cuda".
        place: the file.
        seconds: no measurement begins after so long.
        report: called with the part that is done, 0 to 1, and the name of the next call; at the end with 1 and how many
            calls the time was enough for.

    Returns:
        What was measured.

    Raises:
        UserError: the file cannot be written; said before anything is measured where it is known then.
    """
    machine.require_kept(place)
    start = time.monotonic()
    found: dict[str, Measured] = {}
    calls = problems(device)
    done = 0
    try:
        for i, (problem, training) in enumerate(calls):
            passed = (time.monotonic() - start) / seconds
            name = choice.bucket_of(problem, training).name
            report(max(passed, i / len(calls)), name)
            if passed >= 1:
                break
            kernels = choice.candidates(problem)
            measured = measuring.measure(problem, training, kernels, rivals=True) if kernels else None
            if measured is not None and measured.settled:
                found[name] = measured
            done = i + 1
    finally:
        machine.add(place, device, choices=found, checks=choice.outcomes(device))
    short = "" if done == len(calls) else f" in {seconds:g} s; a larger --seconds measures the others"
    decided = len(list(_usual(device))) - len(calls)
    rest = f"; {decided} others follow committed rows and rules" if decided else ""
    report(1.0, f"{done} of {len(calls)} calls measured{short}{rest}")
    return found


def run(devices: Sequence[str], place: Path, seconds: float) -> int:
    """`fill` with a progress bar on standard error, for each device; returns the exit code."""
    try:
        _run(devices, place, seconds)
    except UserError as error:
        print(f"anomem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"anomem: stopped; what was measured is kept in {place}", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"kept in {place}{_not_followed(place)}", file=sys.stderr)
    return 0


def _not_followed(place: Path) -> str:
    """What must change so that `impl="auto"` follows this file; empty where it does."""
    followed = choice.path()
    if followed is not None and followed.absolute() == place.absolute():
        return ""
    to_follow = "without ANOMEM_CHOICE" if place == choice.default_path() else f"with ANOMEM_CHOICE={place}"
    return f'; impl="auto" follows it {to_follow}'


def _run(devices: Sequence[str], place: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[device]}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for device in devices:
            bar = progress.add_task("", total=1.0, device=device)

            def report(done: float, text: str, bar: TaskID = bar) -> None:
                progress.update(bar, completed=done, description=text)

            fill(device, place, seconds, report)
    backends.forget()


def positive(text: str) -> float:
    """A finite number > 0 of the command line."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def devices() -> list[str]:
    """The devices of this machine."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure this machine and keep the choices."""
    parser = argparse.ArgumentParser(prog="python -m anomem.calibrate", description=main.__doc__)
    parser.add_argument("--seconds", type=positive, default=60.0, help="of measurements, for each device (default: 60)")
    parser.add_argument("--output", type=Path, help="the file; the one that impl='auto' follows by default")
    options: Any = parser.parse_args(arguments)
    return run(devices(), options.output or choice.path() or choice.default_path(), options.seconds)


if __name__ == "__main__":
    sys.exit(main())
