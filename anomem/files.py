"""Files that are either whole or not there, and what is said when they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from anomem.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes a file or makes a folder: a full disk or a missing permission is told in one sentence.

    Args:
        path: what is being written.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it holds either what it held or all of the new content.

    Args:
        path: where; its folder exists.
        content: what.

    Raises:
        UserError: the file cannot be written; what it held is still there.
    """
    # Beside the file, so that the replacement is one rename; opened plainly, so that its mode follows the umask.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    with writing(path):
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
