"""The two exceptions a user of anomem can cause, warnings at the user's line, and messages about what is missing.

`UserError` is anything the user can mend (a missing file, a folder that already holds a run): the command line prints
its one sentence and exits with status 2. `ArgumentError` is a wrong argument or setting; it is also a `ValueError`,
which Python code expects to catch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend, in one sentence."""


class ArgumentError(UserError, ValueError):
    """A wrong argument: its name, what was expected and what came.

    Args:
        argument: its name as the caller spells it; a setting with its dotted path, `data.image_size`.
        expected: the allowed values.
        received: the value that came; shown with `str`.
        hint: what to do about it, if that is not obvious.
    """

    def __init__(self, argument: str, expected: str, received: object, hint: str | None = None) -> None:
        self.argument = argument
        self.expected = expected
        self.received = received
        self.hint = hint
        super().__init__(f"`{argument}`: expected {expected}, received {received}" + (f"; {hint}" if hint else ""))

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str, object, str | None]]:
        return type(self), (self.argument, self.expected, self.received, self.hint)


def warn(text: str) -> None:
    """A RuntimeWarning that names the line of the user's code, beyond the calls of anomem and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("anomem", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"anomem: {text}", RuntimeWarning, stacklevel=level)


@contextmanager
def optional(purpose: str, extra: str = "lab") -> Iterator[None]:
    """Around the import of an optional package.

    Args:
        purpose: what needs the package: "the data set digits", "drawing figures".
        extra: of this package, which brings it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{purpose} needs the package {error.name}, which is not installed; pip install anomem[{extra}]"
        ) from error


@contextmanager
def enough_memory(settings: str) -> Iterator[None]:
    """Around anything that may need more memory than the machine has.

    Args:
        settings: to lower: "--optimizer.batch-size or --data.image-size".

    Raises:
        UserError: out of memory, on the host or on the device.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class for devices only: on the host its allocator raises a plain RuntimeError.
        text = str(error).lower()
        signs = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
            raise
        raise UserError(f"out of memory; lower {settings}") from error
