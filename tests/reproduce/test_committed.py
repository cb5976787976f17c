"""The committed evidence: every table is what the command writes from the rows beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomem.reproduce.tables import markdown

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SWEEPS = sorted(path.parent for path in RESULTS.glob("*/sweep.json"))


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_tables_are_of_their_rows(sweep: Path) -> None:
    assert (sweep / "table.md").read_text(encoding="utf-8") == markdown(sweep)
    assert f"({sweep.name}/table.md)" in (RESULTS / "README.md").read_text(encoding="utf-8")
    assert not list(sweep.glob("cells")), "no checkpoints"


def test_there_are_sweeps() -> None:
    assert len(SWEEPS) >= 5
