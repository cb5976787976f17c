"""Output: files written whole or not at all and never over what is not ours, and a standard output that was closed."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
    except FileExistsError as error:  # of a folder that is to be made
        raise UserError(f"cannot write {path}: it is no folder") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents unless they exist.

    Raises:
        UserError: it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def require_writable(folder: Path) -> None:
    """Check that files can be written into a folder.

    Raises:
        UserError: they cannot.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {folder}: permission denied")


def cache_folder() -> Path:
    """The project's part of the user's cache folder; of the system's temporary one where the user has no home."""
    folder = os.environ.get("XDG_CACHE_HOME")
    if folder:
        return Path(folder) / "anomem"
    try:
        return Path.home() / ".cache" / "anomem"
    except RuntimeError:  # a user without an entry in the system's list, in a container
        return Path(tempfile.gettempdir()) / "anomem"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` when the block ends without an error.

    Args:
        path: the file; its folder exists.

    Raises:
        UserError: the file cannot be written; its old content is still there.
    """
    # Beside the file, so that the replacement is one rename.
    # A name near the limit of 255 bytes leaves no room for itself and the number.
    temporary = path.with_name(f".{path.name[:50]}.{uuid4().hex}")
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


class Guard:
    """What a command may write: nothing over its inputs, and nothing over what is not ours unless it is asked to.

    Args:
        inputs: the files the command reads.
        overwrite: whether the user has allowed it to replace existing files.
    """

    def __init__(self, inputs: Iterable[Path] = (), overwrite: bool = False) -> None:
        self.overwrite = overwrite
        self.inputs = {found for path in inputs if (found := _identity(path))}

    def require(self, path: Path, option: str, ours: Callable[[Path], bool]) -> None:
        """Check that a file may be written, before the work whose result it takes.

        Args:
            path: the file.
            option: what named it, for messages.
            ours: whether an existing file was written by this program, so that it may be replaced.

        Raises:
            UserError: it is an input or a folder, exists and is not ours, or its folder cannot be written.
        """
        with writing(path):
            try:
                kind: int | None = os.lstat(path).st_mode
            except FileNotFoundError:
                kind = None
        if kind is not None:
            if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
                raise UserError(f"`{option}`: expected a file, received {path}, which is another kind of entry")
            if _identity(path) in self.inputs:
                raise UserError(f"`{option}`: {path} is an input, which is never written over; choose another name")
            if not self.overwrite and not (stat.S_ISREG(kind) and ours(path)):
                raise UserError(
                    f"`{option}`: {path} exists and was not written by anomem; choose another name, or add --overwrite"
                )
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"`{option}`: cannot write {path}: {folder} is no folder that can be written")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, which are the same for every name of a file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def printable(text: str) -> str:
    """A text with file names in it as one line: control characters, and bytes that are not UTF-8, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def discard_output() -> None:
    """Drop what is left for a standard output that takes no more, so that Python does not complain about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
