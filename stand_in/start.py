"""Starting Python anew, on stand-in GPUs."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from stand_in import recording
from stand_in.build import build

STARTED = "ANOMEM_STAND_IN_STARTED"


def start(*arguments: str) -> NoReturn:
    """Go on as Python with these arguments; the process ends with a sentence where that cannot be."""
    if STARTED in os.environ and not recording.present():
        sys.exit("the stand-in was to be loaded before this process (LD_PRELOAD) and was not")
    try:
        environment = build()
    except RuntimeError as reason:
        sys.exit(str(reason))
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **environment, STARTED: "1"})
