"""`anomem score`: scores, verdicts, maps and pictures of image files, of a stream or of a watched folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from anomem.cli import outputs
from anomem.cli.inputs import Given, given_images, is_stream
from anomem.cli.writing import places, require_writable, write_map, write_rows
from anomem.errors import ArgumentError, UserError
from anomem.files import printable
from anomem.train.config import FitConfig, TrainConfig
from anomem.validation import require_count

if TYPE_CHECKING:
    from torch import Tensor

    from anomem.data import ImageFiles
    from anomem.models import AnoMem
    from anomem.train.ranks import Ranks
    from anomem.train.rundir import RunDirectory


@dataclass(frozen=True)
class Score:
    """Score image files with a trained run; higher is more anomalous."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them; - reads an image, or names line by line, from standard input."""
    run: Path
    """Run directory."""
    by: str | None = None
    """Trained run: plain, prior, energy, detector or stage2; stage2 where the run has one, else detector.
    Fitted run: plain, local, whole, both, either or labelled; the one that `anomem fit` named."""
    alpha: float | None = None
    """Fitted run: call about this part of normal images anomalous; that of the fit when not given."""
    fdr: float | None = None
    """Fitted run: instead, of the images called anomalous let at most this part be normal, over all that are given."""
    output: Path | None = None
    """Write a .csv or .json file with all scores instead of printing one."""
    maps: Path | None = None
    """Also write deviation maps into this folder, a .tiff of float32 for each image, at its size.
    With --by plain they are those of "plain", else of "detector", or of "local" where the run is fitted."""
    overwrite: bool = False
    """Replace existing files that anomem did not write, and write maps into folders that hold images.
    Images that are scored and the files of the run are never replaced."""
    max_megapixels: int | None = None
    """Refuse larger images, in millions of pixels; data.max_megapixels of the run when not given."""
    recursive: bool = False
    """Take the images in folders of the given folders too."""
    overlays: bool = False
    """With --maps: also a PNG of each image with its map laid over it."""
    masks: bool = False
    """With --maps: also a PNG of the anomalous pixels, white; of a fitted run, at the threshold of its alpha."""
    sheet: Path | None = None
    """Write a PNG with the 36 most anomalous images and their scores."""
    json: bool = False
    """Print one JSON object a line instead of tabs."""
    watch: bool = False
    """Go on with the images that arrive in the given folders, until it is interrupted; says when the stream drifts."""
    device: str | None = None
    """In place of the run's: cpu, cuda or cuda:N."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Folder of the run's images where they have moved; nothing is written into it."""


def score(command: Score) -> int:
    """Score image files; print one score of each, or write all scores and maps.

    Returns:
        The exit code: 1 where some of the images could not be scored, which are listed at the end.
    """
    from anomem.train.ranks import joined
    from anomem.train.run import device_named

    if command.max_megapixels is not None:
        require_count(command.max_megapixels, "--max-megapixels", 1)
    # The processes of a job score in their own time, and meet at the end only.
    if command.watch:
        return _watch(command)
    with joined(command.device or device_named(command.run), wait=timedelta(days=7)) as ranks:
        with tempfile.TemporaryDirectory(prefix="anomem-") as scratch:
            failures: list[str] = []
            if ranks.count > 1 and any(str(path) == "-" or is_stream(path) for path in command.paths):
                raise UserError("`paths`: expected files or folders for a job of several processes, received a stream")
            given = list(dict.fromkeys(given_images(command.paths, Path(scratch), failures, command.recursive)))
            if not given and not failures:
                raise UserError("`paths`: expected image files or folders of them, received none")
            rows = _score(command, given, failures, ranks) if given else []
        if not ranks.first:
            return 0
        if command.output is not None and rows:
            write_rows(command.output, rows)
            print(f"{len(rows)} scores written to {command.output}")
    if not rows and len(failures) == 1:
        raise UserError(failures[0])
    for failure in failures:
        print(f"anomem: {printable(failure)}", file=sys.stderr)
    if not rows:
        raise UserError("none of the images could be scored")
    if failures:
        print(f"anomem: {len(rows)} images were scored; failures: {len(failures)}", file=sys.stderr)
    return 1 if failures else 0


class Judge(NamedTuple):
    """A trained scorer or a fitted detector, as `score` uses it."""

    model: AnoMem
    batch_size: int
    by: str
    """The score that is printed and decides."""
    columns: Callable[[Tensor], tuple[dict[str, list[Any]], Tensor]]
    """Images [B, C, H, W] -> columns of the table, and maps [B, H, W]."""
    shown: tuple[str, ...]
    """Columns that are printed."""
    decide: Callable[[list[float]], list[str]] | None = None
    """All p-values -> verdicts, where they depend on each other."""
    pixel_threshold: float | None = None
    """Above which a pixel is anomalous, where that is calibrated."""
    calibration: Tensor | None = None
    """[n], scores `by` of the calibration normals."""
    alpha: float = 0.0
    """Part of the normal images that is called anomalous, where that is calibrated."""


def _judge(command: Score) -> tuple[Judge, RunDirectory, TrainConfig | FitConfig]:
    """What scores the images, its run and its configuration."""
    from anomem.train.rundir import RunDirectory

    if command.root is not None and not os.path.isdir(command.root):
        raise UserError(f"`--data.root`: expected a folder, but {command.root} is not there")
    if RunDirectory(command.run).is_fitted():
        return _fitted_judge(command)
    from anomem.train.run import load_scorer

    run, config = RunDirectory.open(command.run, device=command.device, root=command.root)
    if command.alpha is not None:
        raise UserError(f"`--alpha`: {command.run} is not calibrated; `anomem fit` makes runs that say yes or no")
    if command.fdr is not None:
        raise UserError(f"`--fdr`: {command.run} is not calibrated; `anomem fit` makes runs that say yes or no")
    scorer = load_scorer(command.run, device=command.device)
    by = _chosen(command.by, "detector" if scorer.head is None else "stage2", scorer.names)

    def columns(images: Tensor) -> tuple[dict[str, list[Any]], Tensor]:
        scored = scorer(images)
        maps = scored.maps["plain" if by == "plain" else "detector"]
        return {name: numbers.tolist() for name, numbers in scored.scores.items()}, maps

    return Judge(scorer.model, scorer.config.batch_size, by, columns, (by,)), run, config


def _fitted_judge(command: Score) -> tuple[Judge, RunDirectory, FitConfig]:
    import torch

    from anomem.scoring.decision import benjamini_hochberg, check_alpha, normals_needed
    from anomem.train.fitting import load_detector
    from anomem.train.rundir import RunDirectory
    from anomem.validation import percent

    run, config = RunDirectory.open_fitted(command.run, device=command.device, root=command.root)
    detector = load_detector(command.run, device=command.device)
    by = _chosen(command.by, detector.lead, detector.names)
    first = os.environ.get("RANK", "0") == "0"
    calibration, alpha = detector.calibration, detector.alpha if command.alpha is None else command.alpha
    if command.fdr is not None:
        if command.alpha is not None:
            raise UserError("`--fdr`: expected one of --alpha and --fdr, received both")
        check_alpha(command.fdr, "--fdr")
    elif command.alpha is not None:
        check_alpha(command.alpha, "--alpha")
        calibration.check(command.alpha)
    elif calibration.count < normals_needed(detector.alpha) and first:
        advice = "; see --alpha" if calibration.count else ""
        print(f"anomem: no verdicts: {calibration.promise(detector.alpha)}{advice}", file=sys.stderr)
    threshold = None
    if command.maps is not None and calibration.count >= normals_needed(alpha):
        threshold = calibration.pixel_threshold("plain" if by == "plain" else "local", alpha)
    if first and threshold is not None:
        part = "at most" if calibration.held == "split" else "about"
        share = f"{part} {percent(alpha)} of normal images have any"
        print(f"anomem: maps above {threshold:.6g} are anomalous pixels: {share}", file=sys.stderr)

    def decide(p_values: list[float]) -> list[str]:
        assert command.fdr is not None
        count = len(p_values)
        needed = math.ceil(count * calibration.least_alpha / command.fdr - 1e-9)
        if needed > 1:
            allowed = "none" if needed > count else f"either none or at least {needed}"
            print(
                f"anomem: --fdr {command.fdr:g} with {calibration.count} calibration normals can call {allowed} of "
                f"{count} images anomalous",
                file=sys.stderr,
            )
        return _verdicts(benjamini_hochberg(torch.tensor(p_values, dtype=torch.float64), command.fdr))

    def columns(images: Tensor) -> tuple[dict[str, list[Any]], Tensor]:
        found = detector(images, command.alpha, by)
        verdicts = ["-"] * len(images) if found.verdicts is None else _verdicts(found.verdicts)
        values = {name: numbers.tolist() for name, numbers in found.scores.items()}
        maps = found.maps["plain" if by == "plain" else "local"]
        return {**values, "p_value": found.p_values.tolist(), "verdict": verdicts}, maps

    together = None if command.fdr is None else decide
    shown = (by, "p_value", "verdict")
    judge = Judge(
        detector.model, detector.batch_size, by, columns, shown, together, threshold, calibration.scores[by], alpha
    )
    return judge, run, config


def _verdicts(anomalous: Tensor) -> list[str]:
    return ["anomalous" if yes else "normal" for yes in anomalous.tolist()]


def _chosen(by: str | None, default: str, names: Sequence[str]) -> str:
    if by is not None and by not in names:
        raise UserError(f"`--by`: expected one of {', '.join(names)}, received {by!r}")
    return by or default


def _score(
    command: Score,
    given: Sequence[Given],
    failures: list[str],
    ranks: Ranks,
    ready: tuple[Judge, RunDirectory, TrainConfig | FitConfig] | None = None,
) -> list[dict[str, Any]]:
    """Score the images that can be read and name the others in `failures`, each process its share of them.

    Args:
        command: as given.
        given: images.
        failures: gets sentences about those that cannot be scored.
        ranks: of the processes.
        ready: `_judge(command)`, where it is known.

    Returns:
        The rows; in other processes than the first their own.
    """
    from anomem.data import ImageFiles
    from anomem.data.folder import warn_of_unused_range
    from anomem.train.rows import shares

    judge, run, config = ready or _judge(command)
    maps = places(command, given, run, Path(config.data.root))
    files = ImageFiles(
        [image.file for image in given],
        judge.model.encoder.image_size,
        grey=judge.model.mean.shape[0] == 1,
        letterbox=config.data.letterbox,
        levels=config.data.levels,
        max_megapixels=config.data.max_megapixels if command.max_megapixels is None else command.max_megapixels,
    )
    if config.data.levels is None:
        warn_of_unused_range(files.paths, files.max_megapixels)

    rows: list[dict[str, Any]] = []
    pictures = outputs.Pictures(command.overlays, command.masks, command.sheet is not None, judge.pixel_threshold)
    # Batch by batch: the maps of a large folder would not fit into memory.
    share = shares(len(given), ranks.count)[ranks.index]
    if pictures.any and pictures.limits is None:
        _scale_as_before(pictures, judge, given[: share.start], files)
    for start in _progress(range(share.start, share.stop, judge.batch_size), command, len(share)):
        pixels: dict[int, Tensor] = {}
        for i in range(start, min(start + judge.batch_size, share.stop)):
            try:
                pixels[i] = files[i]
            except UserError as error:
                failures.append(str(error).replace(str(given[i].file), given[i].name))
        for i, values, deviation in _judged(judge, given, pixels, failures):
            row = {"path": given[i].name, "kind": None, "anomalous": None, **values}
            rows.append(row)
            if maps:
                try:
                    write_map(maps[i], deviation.cpu(), given[i].file, files)
                except UserError as error:
                    failures.append(str(error))
            if pictures.any:
                try:
                    file = maps[i] if maps else None
                    score = float(values[judge.by])
                    pictures.add(given[i].name, score, deviation.cpu(), given[i].file, files, file)
                except UserError as error:
                    failures.append(str(error))
            if command.output is None and judge.decide is None and ranks.count == 1:
                _print_row(row, judge.shown, command.json)
    if ranks.count > 1:
        everything = _of_all(ranks, rows, failures)
        pictures.join(ranks.all(pictures.kept))
        if not ranks.first:
            return rows
        rows = everything
        for row in rows if command.output is None and judge.decide is None else ():
            _print_row(row, judge.shown, command.json)
    if judge.decide is not None and rows:
        for row, verdict in zip(rows, judge.decide([row["p_value"] for row in rows]), strict=True):
            row["verdict"] = verdict
            if command.output is None:
                _print_row(row, judge.shown, command.json)
    if command.sheet is not None:
        pictures.write_sheet(command.sheet)
    return rows


def _judged(
    judge: Judge, given: Sequence[Given], pixels: Mapping[int, Tensor], failures: list[str]
) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
    """Number, row and deviations [H, W] of the images that have a score.

    Args:
        judge: what scores them.
        given: all images, for their names.
        pixels: number of an image -> [C, H, W] uint8; one batch.
        failures: gets sentences about those without a score.
    """
    import torch

    if not pixels:
        return
    try:
        columns, deviations = judge.columns(torch.stack(list(pixels.values())).to(judge.model.device))
    except ArgumentError as error:  # the fault of one image: each is judged alone
        if len(pixels) == 1:
            failures.extend(f"{given[i].name}: {error}" for i in pixels)
            return
        for i, image in pixels.items():
            yield from _judged(judge, given, {i: image}, failures)
        return
    for place, i in enumerate(pixels):
        row = {name: values[place] for name, values in columns.items()}
        unfit = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if unfit:
            failures.append(f"{given[i].name}: its score {unfit[0]} is not finite")
        else:
            yield i, row, deviations[place]


def _scale_as_before(pictures: outputs.Pictures, judge: Judge, before: Sequence[Given], files: ImageFiles) -> None:
    """Give the pictures of a process the colours of the first process's: the scale of the first image with a map.

    Args:
        pictures: without a scale.
        judge: what scores the images.
        before: the images of the processes before this one.
        files: those and others, in the same order.
    """
    for i, image in enumerate(before):
        with contextlib.suppress(UserError):  # its process names it
            for _, _, deviation in _judged(judge, before, {i: files[i]}, []):
                pictures.set_limits(outputs.photo_and_heat(image.file, deviation.cpu(), files)[1])
                return


def _of_all(ranks: Ranks, rows: list[dict[str, Any]], failures: list[str]) -> list[dict[str, Any]]:
    """The rows of all processes in the order of the images; the first one's `failures` get those of the others."""
    listed = [] if ranks.first else failures  # what cannot be listed is listed by all alike
    parts: list[tuple[list[dict[str, Any]], list[str]]] = ranks.all((rows, listed))
    if ranks.first:
        failures.extend(name for _, names in parts for name in names if name not in failures)
    return [row for part, _ in parts for row in part]


def _progress(starts: range, command: Score, count: int) -> Iterable[int]:
    """The starts of the batches; a bar on the terminal where there are several and nothing else is printed there."""
    from rich.progress import track

    quiet = command.output is None and sys.stdout.isatty()
    if len(starts) < 2 or quiet or command.watch or not sys.stderr.isatty():
        return starts
    return track(starts, f"scoring {count} images", console=Console(stderr=True), transient=True)


def _of_own_name(arrived: Sequence[Given], mapped: dict[Path, Given], failures: list[str]) -> list[Given]:
    """The images whose map has a file of its own; the others are named in `failures`.

    Args:
        arrived: new images.
        mapped: path without suffix -> image; gets the new ones.
        failures: gets a sentence for an image whose map would be written over another one's.
    """
    own = []
    for image in arrived:
        first = mapped.setdefault(image.file.with_suffix(""), image)
        if first == image:
            own.append(image)
        else:
            failures.append(f"{image.name}: expected a name of its own, but its map would be that of {first.name}")
    return own


def _watch(command: Score) -> int:
    """Score what arrives in a folder until it is interrupted, and say when the stream drifts.

    A file is scored when it has not changed for a second, so that one that is still being written is left alone; and
    again when another image has taken its place.

    Returns:
        The exit code: 1 where some of the images could not be scored.
    """
    from anomem.drift import Martingale, OnlinePValues
    from anomem.train.ranks import joined

    if len(command.paths) != 1 or not os.path.isdir(command.paths[0]):
        raise UserError(f"`--watch`: expected one folder, received {', '.join(map(str, command.paths)) or 'none'}")
    if command.fdr is not None or command.sheet is not None:
        raise UserError("`--watch`: expected neither --fdr nor --sheet, which need all images at once")
    ready = _judge(command)
    judge, run, _ = ready
    require_writable(command, [], run)
    p_of = None if judge.calibration is None else OnlinePValues(judge.calibration)
    drift, seen_as, done = Martingale(ignore=judge.alpha), dict[Given, Stamp](), dict[Given, Stamp]()
    mapped: dict[Path, Given] = {}
    rows: list[dict[str, Any]] = []
    """Those of the file."""
    scored = failed = 0
    try:
        with joined("cpu", wait=timedelta(days=7)) as ranks:
            while True:
                listed: list[str] = []
                found = given_images(command.paths, Path(), listed, command.recursive)
                now = {image: stamp for image in found if (stamp := _stamp(image)) is not None}
                arrived = [image for image, stamp in now.items() if done.get(image) != stamp == seen_as.get(image)]
                seen_as = now
                done.update((image, now[image]) for image in arrived)
                failures: list[str] = []
                if command.maps is not None:
                    arrived = _of_own_name(arrived, mapped, failures)
                new = _score(command, arrived, failures, ranks, ready) if arrived else []
                scored += len(new)
                failed += len(failures)
                for failure in failures:
                    print(f"anomem: {printable(failure)}", file=sys.stderr)
                for row in new:
                    if p_of is not None and drift.update(p_of(row[judge.by])):
                        print(f"anomem: {drift.sentence()}", file=sys.stderr)
                if new and command.output is not None:
                    rows += new
                    write_rows(command.output, rows)
                sys.stdout.flush()
                time.sleep(1)
    except KeyboardInterrupt:
        seen = f"; {drift.sentence()}" if drift.seen else ""
        print(f"anomem: {scored} images were scored, {failed} could not be{seen}", file=sys.stderr)
    return 1 if failed else 0


class Stamp(NamedTuple):
    """What changes with a file's content."""

    size: int
    changed: int
    """Nanoseconds."""
    number: int
    """Of the file in its file system: another one, moved into place, may have the old one's time."""


def _stamp(image: Given) -> Stamp | None:
    """None where the file has gone or is empty."""
    try:
        found = os.stat(image.file)
    except OSError:
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino) if found.st_size else None


def _print_row(row: Mapping[str, Any], shown: Sequence[str], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps({name: value for name, value in row.items() if value is not None}))
        return
    cells = [f"{row[name]:.6g}" if isinstance(row[name], float) else row[name] for name in shown]
    print("\t".join([*cells, printable(row["path"])]))
