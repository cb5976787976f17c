"""Pages: text between `<!-- rows: NAME -->` and `<!-- end -->` is generated from rows by the section NAME."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.report import accuracy, cells, counts, export, learning, memories, speeds, tables

PAGES = ("README.md", "docs/PERFORMANCE.md", "docs/RESULTS.md", "docs/EXPORT.md")
SECTIONS = (
    tables.SECTIONS
    | counts.SECTIONS
    | accuracy.SECTIONS
    | cells.SECTIONS
    | learning.SECTIONS
    | export.SECTIONS
    | memories.SECTIONS
    | speeds.SECTIONS
)
_MARKED = re.compile(r"(<!-- rows: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: Path) -> str:
    """A page with every marked section generated again.

    Args:
        text: of the page.
        results: folder of rows.

    Raises:
        KeyError: a marker names no section; the message lists them.
    """

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in SECTIONS:
            raise KeyError(f"no section {name!r}; there are {', '.join(SECTIONS)}")
        return f"{match[1]}{SECTIONS[name](results)}\n{match[3]}"

    return _MARKED.sub(section, text)


def rewrite(page: Path, results: Path) -> None:
    """Render a page in place."""
    page.write_text(render(page.read_text(encoding="utf-8"), results), encoding="utf-8")
