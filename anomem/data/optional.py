"""Packages that only some data sets, baselines and figures need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anomem.errors import UserError


@contextmanager
def optional(purpose: str) -> Iterator[None]:
    """Around the import of an optional package: tells in one sentence what it was wanted for.

    Args:
        purpose: "the digits data set", "figures".

    Raises:
        UserError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{purpose} needs the package {error.name}, which is not installed; pip install anomem[lab]"
        ) from error
