"""One look for every figure, and how a figure is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomem.errors import optional
from anomem.files import writing

with optional("drawing figures"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

from anomem.validation import require

# Okabe and Ito's palette, told apart with any common colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, MUTED, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
NORMAL, ANOMALOUS = BLUE, ORANGE
# Evenly bright from dark to light, and told apart with any colour vision.
MAP = "cividis"
HEAT = "inferno"

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "anomem",
}
FORMATS = (".png", ".pdf", ".svg")


@contextmanager
def figure(path: str | os.PathLike[str], width: float, height: float, gap: float = 0.04) -> Iterator[Figure]:
    """A figure in the common style, written when the block ends without an error.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        path: .png, .pdf or .svg; its folder is made if need be.
        width: in inches.
        height: in inches.
        gap: to the left and right of each panel, in inches.

    Raises:
        ArgumentError: another kind of file.
        UserError: the file cannot be written.
    """
    target = Path(path)
    require(target.suffix in FORMATS, "path", f"a file named {', '.join('*' + f for f in FORMATS)}", target.name)
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=gap))
        yield drawn
        beside = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
        # No date inside, so that equal figures are equal files.
        metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(target.suffix)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                drawn.savefig(beside, metadata=metadata)
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)


def shades(count: int) -> list[Any]:
    """Colours of an ordered family (scales fine to coarse), dark to light, all visible on white."""
    colours = matplotlib.colormaps[MAP]
    return [colours(0.05 + 0.75 * i / max(count - 1, 1)) for i in range(count)]


def percent(share: float) -> str:
    """0.083 -> "8.3 %"."""
    return f"{100 * share:.1f} %"
