"""What each process of a job does in `test_processes.py`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from anomem.cli import main


def command(arguments: list[str], code: int, folder: str) -> None:
    """Run a command line; what it prints goes into a file of the process."""
    out, err = (Path(folder, f"{name}{os.environ['RANK']}") for name in ("out", "err"))
    with (
        out.open("w") as printed, err.open("w") as said,
        contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said),
    ):  # fmt: skip
        found = main(arguments)
    expected = code if os.environ["RANK"] == "0" else 0
    assert found == expected, err.read_text()
