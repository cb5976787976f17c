"""The common style of the figures, and the context that writes one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomem.errors import optional
from anomem.files import make_folder, printable, replacing

with optional("drawing figures"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

from anomem.validation import require

# Okabe and Ito's palette, distinguishable with any common colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, MUTED, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
NORMAL, ANOMALOUS = BLUE, ORANGE
# Perceptually uniform from dark to light, and distinguishable with any colour vision.
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
SOFTWARE = "anomem"
"""Written into every .png."""


@contextmanager
def figure(path: str | os.PathLike[str], width: float, height: float, gap: float = 0.04) -> Iterator[Figure]:
    """A figure in the common style, written atomically when the block ends without an error.

    Args:
        path: .png, .pdf or .svg; its folder is made if missing.
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
        fig = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=gap))
        yield fig
        # No date inside, so that equal figures are equal files.
        metadata = {".png": {"Software": SOFTWARE}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
        make_folder(target.parent)
        with replacing(target) as temporary:
            fig.savefig(temporary, format=target.suffix[1:], metadata=metadata[target.suffix])


def is_figure(path: Path) -> bool:
    """Whether a .png file was written here, so that it may be replaced."""
    with path.open("rb") as file:
        return b"Software\0" + SOFTWARE.encode() in file.read(4096)


def plain(name: str) -> str:
    """A name from outside as a label: no formula, and nothing that cannot be drawn."""
    return printable(name).replace("$", r"\$")


def shades(count: int) -> list[Any]:
    """Colours of an ordered family (scales fine to coarse), dark to light, all visible on white."""
    colours = matplotlib.colormaps[MAP]
    return [colours(0.05 + 0.75 * i / max(count - 1, 1)) for i in range(count)]


def percent(share: float) -> str:
    """0.083 -> "8.3 %"."""
    return f"{100 * share:.1f} %"
