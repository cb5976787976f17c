"""Figures are written whole, the same for the same input, and show what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from anomem import plots
from anomem.errors import ArgumentError, UserError
from anomem.plots import style
from anomem.testing import draw

COUNT = 30
IS_ANOMALY = torch.arange(COUNT) % 3 == 0
SCORES = draw(COUNT) + 2 * IS_ANOMALY
IMAGES = torch.randint(0, 256, (COUNT, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MAPS = draw(COUNT, 12, 12).abs()
ROWS = [
    {"stage": "stage1", "step": step, "seconds": 1.0, "loss": 9.0 / step, "contrast/fine": 1.0, "contrast/coarse": 2.0}
    for step in (1, 2, 3)
]

FIGURES: dict[str, Callable[[Path], None]] = {
    "loss curves": lambda path: plots.loss_curves([*ROWS, {"stage": "stage2", "step": 1, "loss": 1.0}], path),
    "one histogram": lambda path: plots.score_histograms(SCORES, IS_ANOMALY, path),
    "histograms": lambda path: plots.score_histograms({str(i): SCORES * i for i in range(4)}, IS_ANOMALY, path),
    "roc": lambda path: plots.roc_curves({"ours": SCORES, "other": draw(COUNT)}, IS_ANOMALY, path, ["ours"]),
    "extremes": lambda path: plots.extremes(
        IMAGES, SCORES, MAPS, IS_ANOMALY, path, masks=(MAPS > 2) & IS_ANOMALY[:, None, None], count=3
    ),
    "extremes in colour": lambda path: plots.extremes(
        IMAGES.expand(-1, 3, -1, -1), SCORES, MAPS, IS_ANOMALY, path, kinds=["a"] * COUNT, count=2
    ),
    "prototypes": lambda path: plots.prototypes(IMAGES, draw(COUNT, 7).softmax(1), path, count=5, per_prototype=2),
    "tsne": lambda path: plots.tsne(draw(6, 8), draw(12, 8, seed=1), draw(9, 8, seed=2), path),
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures a test draws, to be looked into."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: object, **kwargs: object) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return drawn


@pytest.mark.parametrize("name", FIGURES)
def test_written_and_reproducible(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "a.png", tmp_path / "b.png"
    for path in (first, second):
        FIGURES[name](path)
    assert first.read_bytes() == second.read_bytes()
    pixels = np.asarray(Image.open(first).convert("RGB"))
    assert min(pixels.shape[:2]) > 250
    assert tuple(pixels[0, 0]) == (255, 255, 255), "light background"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.png", "b.png"], "nothing is left beside it"


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.score_histograms(SCORES, IS_ANOMALY, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_failure_keeps_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figure.png"
    path.write_text("old")

    def fail(self: Figure, target: Path, **kwargs: object) -> None:
        Path(target).write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match=r"cannot write .*figure\.png: no space left"):
        plots.score_histograms(SCORES, IS_ANOMALY, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`path`: expected a file named \*.png, \*.pdf, \*.svg, received plot.gif"):
        plots.score_histograms(SCORES, IS_ANOMALY, tmp_path / "plot.gif")


def test_style_stays_in_its_figure(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.score_histograms(SCORES, IS_ANOMALY, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_loss_curves_show_every_point(tmp_path: Path, seen: list[Figure]) -> None:
    plots.loss_curves(ROWS, tmp_path / "a.png")
    loss, contrast = seen[0].axes
    assert loss.get_title(loc="left") == "loss"
    assert contrast.get_title(loc="left") == "contrast (nats)"
    assert loss.lines[0].get_xydata().tolist() == [[1, 9.0], [2, 4.5], [3, 3.0]]
    assert [line.get_label() for line in contrast.lines] == ["scale fine", "scale coarse"]


def test_classes_add_up_to_100_percent(tmp_path: Path, seen: list[Figure]) -> None:
    plots.score_histograms(SCORES, IS_ANOMALY, tmp_path / "a.png", bins=5)
    filled = [patch.get_xy() for patch in seen[0].axes[0].patches if patch.get_alpha() == 0.3]
    for outline in filled:
        # The upper edge of five bins, two corners each.
        assert sum(outline[1:11:2, 1]) == pytest.approx(100)


def test_roc_is_sorted_and_zooms_only_where_it_helps(tmp_path: Path, seen: list[Figure]) -> None:
    plots.roc_curves({"bad": draw(COUNT), "good": 5.0 * IS_ANOMALY}, IS_ANOMALY, tmp_path / "a.png")
    plots.roc_curves({"bad": draw(COUNT)}, IS_ANOMALY, tmp_path / "b.png")
    assert [len(figure.axes) for figure in seen] == [2, 1]
    labels = [text.get_text() for text in seen[0].legends[0].get_texts()]
    assert labels[0] == "1.000  good"
    assert labels[1].endswith("bad")


def test_extremes_are_the_extremes(tmp_path: Path, seen: list[Figure]) -> None:
    plots.extremes(IMAGES, SCORES, MAPS, IS_ANOMALY, tmp_path / "a.png", count=2)
    order = SCORES.argsort(descending=True)

    def picture(row: int, column: int) -> Tensor:
        return torch.from_numpy(np.asarray(seen[0].axes[2 * row + column].images[0].get_array()))

    for row, column, index in ((0, 0, order[0]), (0, 1, order[1]), (2, 0, order[-1]), (2, 1, order[-2])):
        assert torch.equal(picture(row, column), IMAGES[index, 0].float() / 255)
    frame = seen[0].axes[0].spines["left"].get_edgecolor()
    assert bool(IS_ANOMALY[order[0]])
    assert torch.tensor(frame[:3]).mul(255).round().tolist() == [0xD5, 0x5E, 0x00] == _rgb(style.ANOMALOUS)


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_prototypes_by_use_with_their_images(tmp_path: Path, seen: list[Figure]) -> None:
    weights = torch.full((COUNT, 3), 0.1)
    weights[:, 2] = 0.8
    weights[11, 2] = 0.9
    plots.prototypes(IMAGES, weights, tmp_path / "a.png", count=2, per_prototype=1)
    first = seen[0].axes[0]
    assert first.get_title(loc="left").startswith("prototype 2, 80.")
    assert np.array_equal(np.asarray(first.images[0].get_array()), IMAGES[11, 0].numpy() / np.float32(255))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda path: plots.loss_curves([{"step": 1}], path),
            '`rows`: expected rows with "step" and "loss", received 1',
        ),
        (lambda path: plots.score_histograms({}, IS_ANOMALY, path), "`scores`: expected at least one score"),
        (lambda path: plots.roc_curves({}, IS_ANOMALY, path), "`scores`: expected at least one score"),
        (
            lambda path: plots.roc_curves({"nan": SCORES * float("nan")}, IS_ANOMALY, path),
            "`scores`: expected finite numbers",
        ),
        (
            lambda path: plots.extremes(IMAGES, SCORES, MAPS[:, :4], IS_ANOMALY, path),
            r"`maps`: expected \[T, H, W\] like the images, received shape \[30, 4, 12\]",
        ),
        (
            lambda path: plots.prototypes(IMAGES, torch.rand(4, 3), path),
            r"`weights`: expected \[30, M\], one row per image, received shape \[4, 3\]",
        ),
        (
            lambda path: plots.tsne(draw(3, 4), draw(3, 5), draw(3, 4), path),
            r"`prototypes`: expected \[M, d\] like \[N, d\] and \[A, d\] of the samples, received \[\[3, 4\], \[3, 5\]",
        ),
    ],
)
def test_bad_input(call: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_one_row_of_a_log_is_seen(tmp_path: Path, seen: list[Figure]) -> None:
    plots.loss_curves(ROWS[:1], tmp_path / "a.png")
    markers = {line.get_marker() for axes in seen[0].axes for line in axes.lines}
    assert markers == {"o"}


def test_the_caption_of_two_images_is_whole(tmp_path: Path, seen: list[Figure]) -> None:
    plots.extremes(IMAGES[:2], SCORES[:2], MAPS[:2], IS_ANOMALY[:2], tmp_path / "a.png")
    (drawn,) = seen
    (caption,) = (text for text in drawn.findobj(Text) if text.get_text().startswith("Name and score"))
    assert caption.get_window_extent(FigureCanvasAgg(drawn).get_renderer()).x1 < drawn.bbox.x1


def test_files_and_the_score_are_named(tmp_path: Path, seen: list[Figure]) -> None:
    files = [f"photos/part_{i:02d}_of_a_long_series.png" for i in range(COUNT)]
    plots.extremes(IMAGES, SCORES, MAPS, IS_ANOMALY, tmp_path / "a.png", files=files, score="detector", count=2)
    texts = [text.get_text() for text in seen[0].findobj(Text)]
    first = int(SCORES.argmax())
    assert f"anomaly\npart_{first:02d}…ries.png\n{float(SCORES[first]):.3g}" in texts
    assert any(text.startswith("Name, file and score (detector) stand above each image") for text in texts)


@pytest.mark.parametrize("anomalous", [True, False])
def test_histograms_of_one_class(tmp_path: Path, seen: list[Figure], anomalous: bool) -> None:
    plots.score_histograms(SCORES, torch.full((COUNT,), anomalous), tmp_path / "a.png")
    assert seen[0].axes[0].get_title(loc="left") == "one class only"
