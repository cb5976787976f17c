"""The command `anomem`: fit, train, evaluate, score, plot, export, report, drift, reproduce.

Exit codes: 0 done; 1 some of the images could not be scored, a stream drifts, or a fault of the program; 2 something
the user can mend (one sentence on stderr); 130 interrupted, 143 terminated, 129 hung up; 141 the reader of the output
has closed it (`| head`).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from anomem import __version__
from anomem.errors import UserError
from anomem.files import discard_output, printable

if TYPE_CHECKING:
    from anomem.cli.commands import Evaluate, Fit, Plot, Train
    from anomem.cli.elsewhere import Drift, Export, Report
    from anomem.cli.reproduce import Reproduce
    from anomem.cli.score import Score
    from anomem.train.config import TrainConfig

WITHOUT_FILES = ("digits", "textures")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; those of the process when None.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not end a training.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return 141
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT):
            raise
        discard_output()
        print(f"anomem: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return 2
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"anomem: warning: {printable(str(message).removeprefix('anomem: '))}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"anomem {__version__}")
        return 0
    try:
        # They take seconds to import.
        from anomem.cli import commands, elsewhere, reproduce, score

        command = _parsed(arguments)
        if isinstance(command, commands.Train):
            commands.train(command)
        elif isinstance(command, commands.Fit):
            commands.fit(command)
        elif isinstance(command, commands.Evaluate):
            commands.evaluate(command)
        elif isinstance(command, score.Score):
            return score.score(command)
        elif isinstance(command, elsewhere.Export):
            elsewhere.export(command)
        elif isinstance(command, elsewhere.Report):
            elsewhere.report(command)
        elif isinstance(command, elsewhere.Drift):
            return elsewhere.drift(command)
        elif isinstance(command, reproduce.Reproduce):
            reproduce.reproduce(command, arguments)
        else:
            commands.plot(command)
    except UserError as error:
        print(f"anomem: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):  # after SIGHUP there is no terminal
            print(f"anomem: {printable(str(stop)) or 'interrupted'}", file=sys.stderr)
        return 128 + int(getattr(stop, "signal", signal.SIGINT))
    except SystemExit as stop:  # tyro: help, or a wrong option
        return int(stop.code or 0)
    return 0


def _parsed(arguments: list[str]) -> Fit | Train | Evaluate | Score | Plot | Export | Report | Drift | Reproduce:
    """As `_parse`; of several processes with one command line, the first alone says what is wrong with it."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
        return _parse(arguments)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return _parse(arguments)
        except UserError as error:
            raise SystemExit(2) from error


def _parse(arguments: list[str]) -> Fit | Train | Evaluate | Score | Plot | Export | Report | Drift | Reproduce:
    import tyro

    from anomem.cli.commands import Evaluate, Fit, Plot, Train
    from anomem.cli.elsewhere import Drift, Export, Report
    from anomem.cli.reproduce import Reproduce
    from anomem.cli.score import Score
    from anomem.train.config import TrainConfig

    start = _starting_point(arguments[1:]) if arguments[:1] == ["train"] else TrainConfig()
    kinds: Any = (
        Annotated[Fit, tyro.conf.subcommand("fit")]
        | Annotated[Train, tyro.conf.subcommand("train", default=Train(settings=start))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Score, tyro.conf.subcommand("score")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Drift, tyro.conf.subcommand("drift")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    )
    about = "Anomaly detection with contrasted memories. `anomem --version` prints the version."
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command: Fit | Train | Evaluate | Score | Plot | Export | Report | Drift | Reproduce = tyro.cli(
                kinds, args=arguments, prog="anomem", description=about
            )
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
    from anomem.train.config import Preset, TrainConfig, load_config, preset

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--config", "--data.dataset", "--data.root"):
        parser.add_argument(name, default=None)
    try:
        known, _ = parser.parse_known_args(arguments)
    except SystemExit:  # an option without its value: tyro says so better
        return TrainConfig()
    dataset, root = vars(known)["data.dataset"], vars(known)["data.root"]
    if known.config is not None:
        if known.preset is not None:
            raise UserError("`--preset` and `--config` are both settings to start from: give one of them")
        start = load_config(TrainConfig, Path(known.config))
        dataset = dataset or start.data.dataset
    else:
        name = known.preset or dataset or ("digits" if root is None else "folder")
        start = preset(name) if name in get_args(Preset) else TrainConfig()  # tyro complains about others
        dataset = dataset or start.data.dataset
    if root is not None and dataset in WITHOUT_FILES:
        raise UserError(
            f"`--data.root`: the data set {dataset} reads no files; for your own images add --preset folder"
        )
    return start
