"""The four commands, each with its options. Imports that take a second wait until the command is known."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomem.data import Dataset
from anomem.errors import UserError
from anomem.files import Guard, make_folder, printable, write_atomically
from anomem.train.config import TrainConfig, preset

if TYPE_CHECKING:
    from torch import Tensor

    from anomem.data import Task
    from anomem.train.rundir import RunDirectory

STREAM_LIMIT = 2**30  # bytes of an image or of a list of names on standard input
ROWS = re.compile(rb'(path|image),kind,anomalous,|\[\s*\{\s*"path": ')
"""How a file of scores begins."""
DESCRIPTION = "anomem deviation map"
"""In the TIFF tag ImageDescription (270) of every map."""


@dataclass(frozen=True)
class Train:
    """Train a detector and write a run directory."""

    preset: Dataset | None = None
    """Settings to start from; that of --data.dataset when not given."""
    config: Path | None = None
    """Settings to start from: the config.json of a run. Options on the command line come on top."""
    resume: Path | None = None
    """Go on with the run in this directory; its own settings are used."""
    quiet: bool = False
    """Print only the run directory."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on its test images, next to baselines and controls; writes metrics.json and scores.csv."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    controls: tuple[Literal["untrained", "one_prototype"], ...] = ()
    """Fair controls to compute as well: the untrained encoder; the whole training with one prototype."""
    baselines: bool = True
    """Fit kNN, one-class SVM, LOF and isolation forest on raw pixels."""
    overwrite: bool = False
    """Replace files of the run directory that anomem did not write."""


@dataclass(frozen=True)
class Score:
    """Score image files with a trained run; higher is more anomalous."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them; - reads an image, or names line by line, from standard input."""
    run: Path
    """Run directory."""
    by: str | None = None
    """Which score: plain, prior, energy, detector or stage2; stage2 where the run has one, else detector."""
    output: Path | None = None
    """Write a .csv or .json file with all scores instead of printing one."""
    maps: Path | None = None
    """Also write deviation maps into this folder, a .tiff of float32 for each image, at its size; those of "plain" with
    --by plain, else of "detector"."""
    overwrite: bool = False
    """Replace existing files that anomem did not write, and write maps into folders that hold images. Images that are
    scored and the files of the run are never replaced."""
    max_megapixels: int | None = None
    """Refuse larger images, in millions of pixels; data.max_megapixels of the run when not given."""


@dataclass(frozen=True)
class Plot:
    """Draw the figures of a run into its folder figures/."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    overwrite: bool = False
    """Replace figures that anomem did not write."""


def train(command: Train) -> None:
    """Train a new run, or continue one."""
    from anomem.train import run

    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"expected one process, received WORLD_SIZE={processes}: a run is trained by one process on one device; "
            "start it without torchrun"
        )
    if command.resume is None:
        path = run.train(command.settings, quiet=command.quiet)
    else:
        if command.settings != preset("digits") or command.config or command.preset:
            raise UserError("`--resume` goes on with the settings of the run: give no others")
        path = run.resume(command.resume, quiet=command.quiet)
    following = f"anomem evaluate {path}, or anomem score --run {path} FILES"
    print(path if command.quiet else f"run written to {path}; next: {following}")


def evaluate(command: Evaluate) -> None:
    """Measure a run; write metrics.json and scores.csv."""
    from anomem.evaluate.report import control, report
    from anomem.scoring import score_images
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    guard = Guard(overwrite=command.overwrite)
    guard.require(run.scores_file, "RUN", lambda path: _begins(path, ROWS))
    guard.require(run.metrics_file, "RUN", lambda path: _begins(path, re.compile(rb'\{\s*"task": ')))
    scored = score_images(scorer, task.test)
    _write_rows(run.scores_file, _score_rows(task, scored.scores))
    controls = {str(name): control(name, config, task) for name in command.controls}
    try:
        metrics = report(
            scorer,
            task,
            config.augment,
            scored=scored,
            seed=config.run.seed,
            controls=controls,
            with_baselines=command.baselines,
        )
    except ImportError as error:
        raise UserError(
            f"the baselines need a package that cannot be imported ({error}); or give --no-baselines"
        ) from error
    run.write_metrics(metrics)
    Console(width=None if sys.stdout.isatty() else 100).print(metrics_table(metrics))
    print(f"written to {run.metrics_file}, image by image to {run.scores_file}; next: anomem plot {command.run}")


def _score_rows(task: Task, scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row per test image: name, kind, label and all scores."""
    names = task.test_paths or [str(i) for i in range(len(task.test))]
    return [
        {
            "path": names[i],
            "kind": task.test_kinds[i],
            "anomalous": int(task.test_is_anomaly[i]),
            **{name: float(values[i]) for name, values in scores.items()},
        }
        for i in range(len(task.test))
    ]


def metrics_table(metrics: dict[str, Any]) -> Table:
    """`metrics.json` as a table.

    Args:
        metrics: from `report`.
    """
    title = f"{metrics['task']}: {metrics['test_images']} test images, {metrics['test_anomalies']} anomalous"
    table = Table(title=Text(printable(title)))  # as Text, since a name may look like rich's markup
    table.add_column("score")
    for name in ("AUROC", "AP", "FPR@95%TPR", "pixel AUROC", "AUPRO@30%"):
        table.add_column(name, justify="right")
    groups = {
        "": metrics["scores"],
        **{f"{name}: ": scores for name, scores in metrics["controls"].items()},
        "raw pixels: ": metrics["baselines"],
    }
    for prefix, scores in groups.items():
        for name, values in scores.items():
            measures = ("auroc", "average_precision", "fpr_at_95_tpr", "pixel_auroc", "aupro")
            table.add_row(prefix + name, *(f"{values[m]:.4f}" if m in values else "" for m in measures))
        table.add_section()
    return table


class Given(NamedTuple):
    """An image that is to be scored."""

    name: str
    """As it was given."""
    file: Path
    """Where it can be read."""


def score(command: Score) -> int:
    """Score image files; print one score of each, or write all scores and maps.

    Returns:
        The exit code: 1 where some of the images could not be scored, which are listed at the end.
    """
    with tempfile.TemporaryDirectory(prefix="anomem-") as scratch:
        failures: list[str] = []
        given = list(dict.fromkeys(_given(command.paths, Path(scratch), failures)))
        if not given and not failures:
            raise UserError("`paths`: expected image files or folders of them, received none")
        rows = _score(command, given, failures) if given else []
    if not rows and len(failures) == 1:
        raise UserError(failures[0])
    for failure in failures:
        print(f"anomem: {printable(failure)}", file=sys.stderr)
    if not rows:
        raise UserError("none of the images could be scored")
    if failures:
        print(f"anomem: {len(failures)} could not be scored, {len(rows)} images were", file=sys.stderr)
    return 1 if failures else 0


def _score(command: Score, given: Sequence[Given], failures: list[str]) -> list[dict[str, Any]]:
    """Score the images that can be read and name the others in `failures`. Returns the rows."""
    import torch

    from anomem.data import ImageFiles
    from anomem.train.run import load_scorer
    from anomem.train.rundir import RunDirectory

    run, config = RunDirectory.open(command.run)
    maps = _places(command, given, run, Path(config.data.root))
    scorer = load_scorer(command.run)
    by = command.by or ("detector" if scorer.head is None else "stage2")
    if by not in scorer.names:
        raise UserError(f"`--by`: expected one of {', '.join(scorer.names)}, received {by!r}")
    files = ImageFiles(
        [image.file for image in given],
        scorer.model.encoder.image_size,
        grey=scorer.model.mean.shape[0] == 1,
        levels=config.data.levels,
        max_megapixels=command.max_megapixels or config.data.max_megapixels,
    )
    rows: list[dict[str, Any]] = []
    # Batch by batch: the maps of a large folder would not fit into memory.
    for start in range(0, len(given), scorer.config.batch_size):
        pixels: dict[int, Tensor] = {}
        for i in range(start, min(start + scorer.config.batch_size, len(given))):
            try:
                pixels[i] = files[i]
            except UserError as error:
                failures.append(str(error).replace(str(given[i].file), given[i].name))
        if not pixels:
            continue
        scored = scorer(torch.stack(list(pixels.values())).to(scorer.model.device))
        values = {name: numbers.tolist() for name, numbers in scored.scores.items()}
        deviations = scored.maps["plain" if by == "plain" else "detector"].cpu() if maps else None
        for place, i in enumerate(pixels):
            scores = {name: numbers[place] for name, numbers in values.items()}
            rows.append({"path": given[i].name, "kind": None, "anomalous": None, **scores})
            if deviations is not None:
                try:
                    _write_map(maps[i], deviations[place], given[i].file, files.max_megapixels)
                except UserError as error:
                    failures.append(str(error))
            if command.output is None:
                print(f"{scores[by]:.6g}\t{printable(given[i].name)}")
    if command.output is not None and rows:
        _write_rows(command.output, rows)
        print(f"{len(rows)} scores written to {command.output}")
    return rows


def _given(paths: Sequence[Path], scratch: Path, failures: list[str]) -> Iterator[Given]:
    """The images of files, folders and streams; what cannot be listed is named in `failures`."""
    from anomem.data import image_files

    for number, path in enumerate(paths):
        try:
            if str(path) != "-" and not _is_stream(path):
                yield from (Given(str(f), f) for f in (image_files(path) if os.path.isdir(path) else [path]))
                continue
            content = _read_stream(path)
            image = scratch / f"stdin{number or ''}"
            image.write_bytes(content)
            if _is_image(image, content):
                yield Given(str(path), image)
                continue
            lines = content.split(b"\0" if b"\0" in content else b"\n")
            names = [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]
            if not names:
                raise UserError(f"{path}: expected an image or names of images, received nothing")
            yield from _given([Path(name) for name in names if name != "-"], scratch, failures)
        except UserError as error:
            failures.append(str(error))


def _is_stream(path: Path) -> bool:
    """Whether it is a pipe that the shell has opened. A FIFO with a name of its own would block."""
    try:
        return re.match(r"/dev/(stdin|fd/\d+)$|/proc/self/fd/\d+$", str(path)) is not None and stat.S_ISFIFO(
            os.stat(path).st_mode
        )
    except OSError:
        return False


def _read_stream(path: Path) -> bytes:
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read(STREAM_LIMIT + 1) if sys.stdin is not None else b""
        else:
            with path.open("rb") as stream:
                content = stream.read(STREAM_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    if len(content) > STREAM_LIMIT:
        raise UserError(f"{path}: expected at most {STREAM_LIMIT >> 20} megabytes, received more")
    return content


def _is_image(file: Path, content: bytes) -> bool:
    """Whether a stream is an image, sound or damaged, and no list of names."""
    from anomem.data.convert import opened

    if content.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*")):
        return True
    try:
        with opened(file, float("inf")):
            return True
    except UserError:
        return False


def _places(command: Score, given: Sequence[Given], run: RunDirectory, root: Path) -> list[Path]:
    """The files of the maps, after checking that everything the command writes may be written.

    Raises:
        UserError: something would be written over an input or over what is not ours.
    """
    settings = (run.config_file, run.given_file, run.split_file, run.log_file, *run.checkpoints.glob("*"))
    guard = Guard([*(image.file for image in given), Path("/dev/fd/0"), *settings], command.overwrite)
    if command.output is not None:
        if command.output.suffix not in (".csv", ".json"):
            raise UserError(f"`--output`: expected a .csv or .json file, received {command.output}")
        guard.require(command.output, "--output", lambda path: _begins(path, ROWS))
    if command.maps is None:
        return []
    files = _map_files(command.maps, given)
    for file in files:
        guard.require(file, "--maps", _is_map)
    if not command.overwrite:
        for folder in {file.parent for file in files}:
            data = [part for name in ("train", "test", "ground_truth") if os.path.isdir(part := root / name)]
            if any(folder.resolve().is_relative_to(part.resolve()) for part in data) or _holds_images(folder):
                raise UserError(
                    f"`--maps`: {folder} is a folder of images; choose another, or add --overwrite to write there"
                )
    return files


def _map_files(folder: Path, images: Sequence[Given]) -> list[Path]:
    """One .tiff per image in a folder, laid out as the images are.

    Raises:
        UserError: two images differ only in their suffix, so that their maps would be one file, or a link in the
            folder leads out of it.
    """
    # Without "..": with it a map would leave the folder.
    absolute = [Path(os.path.abspath(i.name if str(i.file) == i.name else i.file.name)) for i in images]
    common = os.path.commonpath([path.parent for path in absolute])
    files = [(folder / path.relative_to(common)).with_suffix(".tiff") for path in absolute]
    ((file, count),) = Counter(files).most_common(1)
    if count > 1:
        raise UserError(f"`--maps`: expected images of different names, received {count} whose map would be {file}")
    for parent in {file.parent for file in files}:
        if not parent.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"`--maps`: {parent} leads out of {folder}; remove the link")
    return files


def _is_map(path: Path) -> bool:
    """Whether a file is a deviation map of ours."""
    from anomem.data.convert import opened

    try:
        with opened(path, float("inf")) as image:
            return bool(getattr(image, "tag_v2", {}).get(270) == DESCRIPTION)
    except UserError:
        return False


def _holds_images(folder: Path) -> bool:
    """Whether a folder holds images that are no maps of ours."""
    from anomem.data import image_files

    try:
        return os.path.isdir(folder) and not all(_is_map(path) for path in image_files(folder))
    except UserError:  # none in it
        return False


def _begins(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether a file is empty or begins as one of ours."""
    try:
        with path.open("rb") as file:
            content = file.read(4096)
    except OSError:
        return False
    return not content or pattern.match(content) is not None


def _write_map(file: Path, deviations: Tensor, image: Path, max_megapixels: float) -> None:
    """Write one deviation map [H, W] as float32, at the size of its image."""
    import torch.nn.functional as F
    from PIL import Image

    from anomem.data import upright_size

    size = upright_size(image, max_megapixels)
    resized = F.interpolate(deviations[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    buffer = io.BytesIO()
    Image.fromarray(resized.numpy()).save(buffer, format="TIFF", description=DESCRIPTION)
    make_folder(file.parent)
    write_atomically(file, buffer.getvalue())


def _write_rows(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write scores as .csv or .json."""
    if output.suffix == ".json":
        text = json.dumps(rows, indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    make_folder(output.parent)
    # A name that is not UTF-8 has surrogates in it.
    write_atomically(output, text.encode("utf-8", "backslashreplace"))


def plot(command: Plot) -> None:
    """Draw the figures of a run and print their files."""
    from anomem.plots.run import draw_figures, figure_files
    from anomem.plots.style import is_figure
    from anomem.train.run import load_run

    run, config, task, scorer = load_run(command.run)
    guard = Guard(overwrite=command.overwrite)
    for path in figure_files(run.figures).values():
        guard.require(path, "RUN", is_figure)
    for path in draw_figures(run.rows(), task, scorer, run.figures, config.run.seed):
        print(path)
