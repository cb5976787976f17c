"""`python -m benchmarks.report`: rewrite the tables in README.md and docs/, the pictures and `anomem/gains.json`.

It needs `anomem[lab]`.
"""

from __future__ import annotations

from benchmarks.harness.console import say
from benchmarks.harness.rows import RESULTS, ROOT
from benchmarks.report import accuracy, counts, gains, learning, pages, pictures

PICTURES = ROOT / "docs" / "pictures"


def main() -> None:
    """Write pages, pictures and gains; print what was written."""
    written = [ROOT / page for page in pages.PAGES]
    for page in written:
        pages.rewrite(page, RESULTS)
    written += pictures.draw_all(RESULTS, PICTURES)
    written += [path for draw in (accuracy.draw, counts.draw, learning.draw) if (path := draw(RESULTS, PICTURES))]
    written.append(gains.write(RESULTS))
    for path in written:
        say(str(path.relative_to(ROOT)))


if __name__ == "__main__":
    main()
