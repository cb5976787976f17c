"""Restarts Python on stand-in GPUs."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from tests.stand_in import recording
from tests.stand_in.build import build

STARTED = "ANOMEM_STAND_IN_STARTED"


def start(*arguments: str) -> NoReturn:
    """Replace this process by Python with these arguments; end it with a message if the stand-in cannot be built."""
    if STARTED in os.environ and not recording.present():
        sys.exit("LD_PRELOAD names the stand-in, but this process runs without it")
    try:
        environment = build()
    except RuntimeError as reason:
        sys.exit(str(reason))
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **environment, STARTED: "1"})
