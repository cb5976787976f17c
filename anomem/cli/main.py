"""The command `anomem`: train, evaluate, score, plot.

Exit codes: 0 done, 1 a fault of the program, 2 something the user can mend (one sentence on stderr), 130 interrupted,
141 the reader of the output has closed it (`| head`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from anomem import __version__
from anomem.cli import commands
from anomem.cli.commands import Evaluate, Plot, Score, Train
from anomem.errors import UserError
from anomem.train.config import Preset, TrainConfig, load_config, preset


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; those of the process when None.

    Returns:
        The exit code.
    """
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Discard the rest of the buffer, so that Python does not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"anomem {__version__}")
        return 0
    try:
        command = _parse(arguments)
        if isinstance(command, Train):
            commands.train(command)
        elif isinstance(command, Evaluate):
            commands.evaluate(command)
        elif isinstance(command, Score):
            commands.score(command)
        else:
            commands.plot(command)
    except UserError as error:
        print(f"anomem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        training = "; `anomem train --resume DIR` goes on from the last checkpoint (see --run.checkpoint-every)"
        print(f"anomem: interrupted{training if arguments[:1] == ['train'] else ''}", file=sys.stderr)
        return 130
    except SystemExit as stop:  # tyro: help, or a wrong option
        return int(stop.code or 0)
    return 0


def _parse(arguments: list[str]) -> Train | Evaluate | Score | Plot:
    start = _starting_point(arguments[1:]) if arguments[:1] == ["train"] else TrainConfig()
    kinds: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(settings=start))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Score, tyro.conf.subcommand("score")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
    )
    about = "Anomaly detection with contrasted memories."
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command: Train | Evaluate | Score | Plot = tyro.cli(kinds, args=arguments, prog="anomem", description=about)
    except SystemExit as stop:
        # tyro puts the error of a configuration into a box and exits; one sentence is enough.
        error: BaseException | None = stop
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        if error is not None:
            raise error from None
        print(complaint.getvalue(), end="", file=sys.stderr)
        raise
    return command


def _starting_point(arguments: list[str]) -> TrainConfig:
    """The settings that options change: those of a file, a preset, or the preset of the data set."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--config", "--data.dataset"):
        parser.add_argument(name, default=None)
    try:
        known, _ = parser.parse_known_args(arguments)
    except SystemExit:  # an option without its value: tyro says so better
        return TrainConfig()
    if known.config is not None:
        if known.preset is not None:
            raise UserError("`--preset` and `--config` are both settings to start from: give one of them")
        return load_config(TrainConfig, Path(known.config))
    name = known.preset or vars(known)["data.dataset"] or "digits"
    return preset(name) if name in get_args(Preset) else TrainConfig()
