"""Digest of the C++ sources: `setup.py` writes it into a native library, the loader compares it.

Without it an older library would load beside newer Python and misread its arguments. This file imports the standard
library only, because `setup.py` runs it by its path.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

MARK = b"anomem sources "
"""Marks the digest inside a library file."""
_LENGTH = 16
_FOLDERS = {"_C.so": ("", "cpu"), "_C_cuda.so": ("", "cuda")}
"""Folders of csrc/ that each library is built from."""
_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def digest(library: str, root: Path) -> str | None:
    """Digest of a library's sources in a checkout.

    Args:
        library: "_C.so" or "_C_cuda.so".
        root: of the checkout.

    Returns:
        16 hexadecimal digits, or None without sources: an installed package comes with its own library.
    """
    folders = [root / "csrc" / folder for folder in _FOLDERS[library]]
    files = [path for folder in folders for path in sorted(folder.glob("*")) if path.suffix in _SUFFIXES]
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:_LENGTH] if files else None


def built_from(library: Path) -> str | None:
    """The digest in a library file. None if it has none (too old, or not ours)."""
    if library.stat().st_size == 0:
        return None
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(MARK)
        start = at + len(MARK)
        return None if at < 0 else content[start : start + _LENGTH].decode("ascii", "replace")
