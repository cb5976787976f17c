"""The log of the stand-in GPUs, read by a process that runs on them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

# The process itself: the stand-in is among its libraries (LD_PRELOAD).
_LIBRARY: Any = None


class Entry(NamedTuple):
    """One line of the log."""

    kind: str
    """launch, copy, upload, download, fill, allocate, wait, graph or fault."""
    what: str
    """A kernel's name, or a call's."""
    device: int
    stream: int
    """0 is the device's null stream, -1 none."""
    grid: tuple[int, ...]
    block: tuple[int, ...]
    bytes: int
    """Of a launch's dynamic shared memory; copied, filled or allocated by others; nodes of a graph."""
    when: str
    """now, captured or replayed."""


def present() -> bool:
    """Whether this process runs on the stand-in GPUs."""
    return hasattr(ctypes.CDLL(None), "stand_in_log")


def _library() -> Any:
    global _LIBRARY
    if _LIBRARY is None:
        _LIBRARY = ctypes.CDLL(None)
        _LIBRARY.stand_in_log.restype = ctypes.c_char_p
    return _LIBRARY


def _parsed(line: str) -> Entry:
    kind, what, device, stream, grid, block, size, when = line.split("\t")
    shape = [tuple(int(n) for n in x.split(",")) for x in (grid, block)]
    return Entry(kind, what, int(device), int(stream), shape[0], shape[1], int(size), when)


@contextlib.contextmanager
def recorded() -> Iterator[list[Entry]]:
    """Records the block's work for the GPUs; the list is filled when the block ends."""
    entries: list[Entry] = []
    _library().stand_in_record(1)
    try:
        yield entries
    finally:
        _library().stand_in_record(0)
        entries.extend(_parsed(line) for line in _library().stand_in_log().decode().splitlines())


def recorded_so_far() -> int:
    """Number of entries within `recorded`."""
    return len(_library().stand_in_log().splitlines())


def of(entries: list[Entry], *kinds: str) -> list[Entry]:
    """The entries of these kinds."""
    return [entry for entry in entries if entry.kind in kinds]
