"""`python -m stand_in ARGUMENTS`: Python with these arguments on stand-in GPUs."""

from __future__ import annotations

import sys

from stand_in.start import start

if __name__ == "__main__":
    start(*sys.argv[1:])
