"""Lines, tables and progress of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table


def say(text: str) -> None:
    """A line."""
    print(text, flush=True)


def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table; the first column is text, the others are figures."""
    cells = Table()
    for i, column in enumerate(columns):
        cells.add_column(column, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        cells.add_row(*line)
    say(f"\n{title}")
    # A file or a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 120).print(cells)


class Bar(Progress):
    """A progress bar with the elapsed and the remaining time."""

    def __init__(self, total: int) -> None:
        what = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), what)
        super().__init__(*columns, expand=True)
        self._task = self.add_task("", total=total)

    def note(self, text: str) -> None:
        """Show what is being done."""
        self.update(self._task, description=text)

    def step(self) -> None:
        """One case is done."""
        self.advance(self._task)
