"""What `anomem score` is given: image files, folders, streams and lists of names."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from anomem.errors import UserError

STREAM_LIMIT = 2**30  # bytes of an image or of a list of names on standard input


class Given(NamedTuple):
    """An image that is to be scored."""

    name: str
    """As it was given."""
    file: Path
    """Where it can be read."""


def given_images(paths: Sequence[Path], scratch: Path, failures: list[str], recursive: bool = False) -> Iterator[Given]:
    """The images of files, folders and streams; what cannot be listed is named in `failures`."""
    from anomem.data import image_files
    from anomem.data.folder import image_trees

    for path in paths:
        try:
            if str(path) != "-" and not is_stream(path):
                listed = (image_trees if recursive else image_files)(path) if os.path.isdir(path) else [path]
                yield from (Given(str(f), f) for f in listed)
                continue
            content = _read_stream(path)
            image = scratch / f"stdin{len(list(scratch.iterdir())) or ''}"
            image.write_bytes(content)
            if _is_image(image, content):
                yield Given(str(path), image)
                continue
            lines = content.split(b"\0" if b"\0" in content else b"\n")
            names = [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]
            if not names:
                raise UserError(f"{path}: expected an image or names of images, received nothing")
            yield from given_images([Path(name) for name in names if name != "-"], scratch, failures, recursive)
        except UserError as error:
            failures.append(str(error))


def is_stream(path: Path) -> bool:
    """Whether it is a pipe that the shell has opened. A FIFO with a name of its own would block."""
    try:
        return re.match(r"/dev/(stdin|fd/\d+)$|/proc/self/fd/\d+$", str(path)) is not None and stat.S_ISFIFO(
            os.stat(path).st_mode
        )
    except OSError:
        return False


def _read_stream(path: Path) -> bytes:
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read(STREAM_LIMIT + 1) if sys.stdin is not None else b""
        else:
            with path.open("rb") as stream:
                content = stream.read(STREAM_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    if len(content) > STREAM_LIMIT:
        raise UserError(f"{path}: expected at most {STREAM_LIMIT >> 20} megabytes, received more")
    return content


def _is_image(file: Path, content: bytes) -> bool:
    """Whether a stream is an image, sound or damaged, and no list of names."""
    from anomem.data.convert import opened

    if content.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")):
        return True
    try:
        with opened(file, float("inf")):
            return True
    except UserError:
        return False
