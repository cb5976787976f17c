"""`python -m stand_in ARGUMENTS`: Python with these arguments on stand-in GPUs."""

from __future__ import annotations

import os
import sys

from stand_in.build import build

if __name__ == "__main__":
    try:
        environment = build()
    except RuntimeError as reason:
        sys.exit(str(reason))
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **environment})
