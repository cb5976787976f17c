"""The live display fits on a terminal and leaves nothing out."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from anomem.train.monitor import Display, by_name

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "loss": 7.19,
    **{f"{name}/block{scale}": 0.5 + scale for name in ("contrast", "variance", "effective") for scale in (1, 2, 3)},
}


def test_values_are_grouped_by_name_and_scale() -> None:
    grouped = by_name(VALUES)
    assert grouped["loss"] == {"": 7.19}
    assert grouped["variance"] == {"block1": 1.5, "block2": 2.5, "block3": 3.5}


@pytest.mark.parametrize("width", [80, 120])
def test_bar_loss_and_terms_are_drawn_whole(width: int) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, width=width, force_terminal=True, color_system=None)
    display = Display("stage1", 0, 150, console)
    with display.live:
        display.terms = {name: scales for name, scales in by_name(VALUES).items() if name != "loss"}
        display.update(120, loss="loss 7.19", speed="1093 images/s")
    text = drawn.getvalue()
    for part in ("stage1", "120/150", "loss 7.19", "1093 images/s", "left", "block1", "block3", "contrast", "3.5"):
        assert part in text
    assert "…" not in text


def test_training_without_a_terminal_needs_no_rich() -> None:
    code = "import sys; sys.modules['rich'] = None; import anomem.train, anomem.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
