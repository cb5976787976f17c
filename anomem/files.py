"""Output files: written whole or not at all, with one sentence if they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from anomem.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around anything that writes a file or makes a folder: a full disk or a missing permission becomes one sentence.

    Args:
        path: the file or folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents unless they exist.

    Raises:
        UserError: it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` when the block ends without an error.

    Args:
        path: the file; its folder exists.

    Raises:
        UserError: the file cannot be written; its old content is still there.
    """
    # Beside the file, so that the replacement is one rename.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it holds either its old content or all of the new.

    Args:
        path: the file; its folder exists.
        content: all of it.

    Raises:
        UserError: the file cannot be written; its old content is still there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
