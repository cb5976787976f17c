"""The kernel tests run in Triton's interpreter, which tests/conftest.py switches on and mends.

The tests that compile for real GPUs do so in a subprocess without the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import pytest


@pytest.fixture(autouse=True)
def in_the_interpreter(interpreter: None) -> None:
    """Every test here."""


@contextmanager
def _ends_of_grids(count: int, *, whole: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Inside, a launch runs the first and the last `count` programs along each axis.

    A program's work does not depend on how many others there are. So a call whose matrices have more than 2³¹ elements
    is a matter of seconds, and of the few pages of memory that those programs touch.

    Args:
        count: of programs at each end.
        whole: names of kernels that run all their programs.

    Yields:
        The names of the kernels of which programs were left out.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    call = interpreter.GridExecutor.__call__
    cut: list[str] = []

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        full = tuple(self.grid)
        short = full if name in whole else tuple(min(size, 2 * count) for size in full)
        if short == full:
            return call(self, *args, **kwargs)
        cut.append(name)
        full, ends = (sizes + (1,) * (3 - len(sizes)) for sizes in (full, short))
        self.grid = short
        set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

        def place(i: int, axis: int) -> int:
            return i if i < count else full[axis] - ends[axis] + i

        with (
            patch.object(builder, "set_grid_dim", lambda *_: set_dim(*full)),
            patch.object(builder, "set_grid_idx", lambda *at: set_idx(*(place(i, axis) for axis, i in enumerate(at)))),
        ):
            return call(self, *args, **kwargs)

    with patch.object(interpreter.GridExecutor, "__call__", launch):
        yield cut


@pytest.fixture
def ends_of_grids() -> Callable[..., AbstractContextManager[list[str]]]:
    return _ends_of_grids
