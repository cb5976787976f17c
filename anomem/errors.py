"""The two exceptions a user of anomem can cause.

`UserError` is anything the person at the keyboard can mend (a missing file, a folder that already holds a run): the
command line prints its one sentence and exits with status 2. `ArgumentError` is a wrong argument to a function; it is
also a `ValueError`, which is what Python code expects to catch.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend, told in one sentence."""


class ArgumentError(UserError, ValueError):
    """A wrong argument: names it, what was expected and what came.

    Args:
        argument: name of the argument as the caller spells it.
        expected: what would have been right.
        received: what came instead; shown with `str`.
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
