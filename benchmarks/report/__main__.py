"""`python -m benchmarks.report`: rewrite the tables in README.md and docs/PERFORMANCE.md, and the pictures."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.console import has, say
from benchmarks.machine import ROOT
from benchmarks.report import accuracy_picture, counts, pages, pictures

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"


def main() -> int:
    """Write what the rows say; print what was written."""
    written: list[Path] = []
    for page in pages.PAGES:
        pages.rewrite(ROOT / page, RESULTS)
        written.append(ROOT / page)
    if has("matplotlib"):
        written += pictures.draw_all(RESULTS, PICTURES)
        others = [draw(RESULTS, PICTURES) for draw in (accuracy_picture.draw, counts.draw)]
        written += [path for path in others if path]
    else:
        say("matplotlib is not installed (pip install 'anomem[lab]'): the pictures stay as they are")
    for path in written:
        say(str(path.relative_to(ROOT)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
