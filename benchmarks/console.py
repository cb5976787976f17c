"""Command line, progress and tables: tyro and rich where they are installed, argparse and plain lines where not."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def parse(kind: type[T], description: str) -> T:
    """A dataclass from the command line; a wrong option ends the program with status 2 and a message.

    Args:
        kind: a dataclass whose fields are str, int, float, bool, Literal or one of these or None.
        description: for `--help`.
    """
    if has("tyro"):
        import tyro

        return tyro.cli(kind, description=description)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        flag, hint = "--" + field.name.replace("_", "-"), _without_none(hints[field.name])
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        elif typing.get_origin(hint) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(hint), default=default)
        elif hint in (str, int, float):
            parser.add_argument(flag, type=hint, default=default)
        else:
            raise TypeError(f"{kind.__name__}.{field.name}: {hint} needs tyro (pip install tyro)")
    return kind(**vars(parser.parse_args()))


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def say(text: str) -> None:
    """A line."""
    print(text, flush=True)


def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table; the first column is text, the others are figures."""
    if has("rich"):
        from rich.console import Console
        from rich.table import Table

        drawn = Table()
        for i, column in enumerate(columns):
            drawn.add_column(column, justify="right" if i else "left", no_wrap=True)
        for line in lines:
            drawn.add_row(*line)
        # A file or a pipe has no width of its own.
        console = Console(width=None if sys.stdout.isatty() else 120)
        say(f"\n{title}")
        console.print(drawn)
        return
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *lines]:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip(), flush=True)


class Bar(Protocol):
    """Progress of a run."""

    def note(self, text: str) -> None:
        """What is being done."""

    def step(self) -> None:
        """One case is done."""


@contextmanager
def progress(total: int) -> Iterator[Bar]:
    """A progress bar with the elapsed and the remaining time; a line for each case where rich is missing."""
    if not has("rich"):
        yield _Lines(total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    what = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    with Progress(*columns, what, expand=True) as bar:
        yield _Rich(bar, bar.add_task("", total=total))


class _Rich:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def note(self, text: str) -> None:
        self.bar.update(self.task, description=text)

    def step(self) -> None:
        self.bar.advance(self.task)


class _Lines:
    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def note(self, text: str) -> None:
        """Only finished cases make a line."""

    def step(self) -> None:
        self.done += 1
        print(f"{self.done} of {self.total}", flush=True)
