"""What is drawn on a terminal while a stage trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display(Progress):
    """A bar with the loss, the speed and the time left; under it a table of the terms, one column per scale.

    Args:
        console: where it is drawn; standard output when None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.terms: dict[str, dict[str, float]] = {}  # name -> scale -> value
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console or Console(soft_wrap=True),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn at every refresh."""
        yield self.make_tasks_table(self.tasks)
        if self.terms:
            table = Table(box=None, pad_edge=False)
            for heading in ("", *next(iter(self.terms.values()))):
                table.add_column(heading, justify="right" if heading else "left")
            for name, numbers in self.terms.items():
                table.add_row(name, *(f"{number:.3g}" for number in numbers.values()))
            yield table


def by_name(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Values of one name together, by scale: {"loss": {"": 9.1}, "contrast": {"block1": 2.1, "block2": 1.9}}."""
    grouped: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        name, _, scale = key.partition("/")
        grouped.setdefault(name, {})[scale] = value
    return grouped
