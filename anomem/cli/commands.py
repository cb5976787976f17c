"""The four commands, each with its options. Imports that take a second wait until the command is known."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomem.cli import outputs
from anomem.errors import ArgumentError, UserError
from anomem.files import Guard, make_folder, printable, write_atomically
from anomem.train.config import FitConfig, Preset, TrainConfig, preset

if TYPE_CHECKING:
    from torch import Tensor

    from anomem.data import ImageFiles, Task
    from anomem.models import AnoMem
    from anomem.train.ranks import Ranks
    from anomem.train.rundir import RunDirectory

STREAM_LIMIT = 2**30  # bytes of an image or of a list of names on standard input
ROWS = re.compile(rb'(path|image),kind,anomalous,|\[\s*\{\s*"path": ')
"""How a file of scores begins."""
DESCRIPTION = "anomem deviation map"
"""In the TIFF tag ImageDescription (270) of every map."""


@dataclass(frozen=True)
class Train:
    """Train a detector and write a run directory."""

    preset: Preset | None = None
    """Settings to start from; that of --data.dataset when not given."""
    config: Path | None = None
    """Settings to start from: the config.json of a run. Options on the command line come on top."""
    resume: Path | None = None
    """Go on with the run in this directory; its own settings are used."""
    quiet: bool = False
    """Print only the run directory."""
    profile: int | None = None
    """Train no run: print where the time of so many steps goes, and write a trace of them."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Fit:
    """Fit a detector to good images in seconds, without training: yes or no at a false-alarm rate you choose."""

    folder: tyro.conf.Positional[Path | None] = None
    """Folder of good images, or with train/good; labelled defects, if any, in DIR/anomalous. Short for --data.root."""
    quiet: bool = False
    """Print only the run directory."""
    settings: Annotated[FitConfig, tyro.conf.arg(name="")] = field(default_factory=FitConfig)


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
    device: str | None = None
    """In place of the run's: cpu, cuda or cuda:N."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Folder of the run's images where they have moved."""


@dataclass(frozen=True)
class Score:
    """Score image files with a trained run; higher is more anomalous."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them; - reads an image, or names line by line, from standard input."""
    run: Path
    """Run directory."""
    by: str | None = None
    """Which score: plain, prior, energy, detector or stage2; stage2 where the run has one, else detector. Of a fitted
    run: plain, local, whole, both, either or labelled; the one that `anomem fit` named."""
    alpha: float | None = None
    """Fitted run: call about this part of normal images anomalous; that of the fit when not given."""
    fdr: float | None = None
    """Fitted run: instead, of the images called anomalous let at most this part be normal, over all that are given."""
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


@dataclass(frozen=True)
class Plot:
    """Draw the figures of a run into its folder figures/."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    device: str | None = None
    """In place of the run's: cpu, cuda or cuda:N."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Folder of the run's images where they have moved."""
    overwrite: bool = False
    """Replace figures that anomem did not write."""


def train(command: Train) -> None:
    """Train a new run, or continue one."""
    from anomem.train import run

    if command.profile is not None:
        from anomem.train.profiling import profile_steps

        if command.resume is not None:
            raise UserError("`--profile` trains no run: leave out --resume, and give the run's config.json as --config")
        found = profile_steps(command.settings, command.profile)
        if found is not None:
            print(f"{found.table()}\ntrace of {command.profile} steps in {found.trace}; open it in ui.perfetto.dev")
        return
    if command.resume is None:
        path = run.train(command.settings, quiet=command.quiet)
    else:
        if command.settings != preset("digits") or command.config or command.preset:
            raise UserError("`--resume` goes on with the settings of the run: give no others")
        path = run.resume(command.resume, quiet=command.quiet)
    if os.environ.get("RANK", "0") != "0":  # the first process of torchrun's speaks
        return
    following = f"anomem evaluate {path}, or anomem score --run {path} FILES"
    print(path if command.quiet else f"run written to {path}; next: {following}")


def fit(command: Fit) -> None:
    """Fit a detector and write a run directory."""
    from anomem.train.fitting import fit_run

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a fit takes seconds and runs in one process: start it without torchrun")
    config = command.settings
    if command.folder is not None:
        if config.data.dataset != "folder":
            raise UserError(f"`--data.dataset`: {config.data.dataset} reads no folder; give one of both")
        config = replace(config, data=replace(config.data, root=str(command.folder)))
    elif config.data == FitConfig().data:
        raise UserError("`folder`: expected a folder of good images, received none")
    path = fit_run(config, quiet=command.quiet)
    following = f"anomem score --run {path} FILES"
    print(path if command.quiet else f"run written to {path}; next: {following}")


def evaluate(command: Evaluate) -> None:
    """Measure a run; write metrics.json and scores.csv."""
    from anomem.train.rundir import RunDirectory

    if RunDirectory(command.run).is_fitted():
        _evaluate_fitted(command)
    else:
        _evaluate_trained(command)


def _evaluate_fitted(command: Evaluate) -> None:
    from anomem.evaluate.fitted import explained, report
    from anomem.train.fitting import load_fitted_run

    if command.controls:
        raise UserError(f"`--controls`: {command.run} was not trained, so that it has no controls of a training")
    run, config, task, detector = load_fitted_run(command.run, device=command.device, root=command.root)
    _guard_results(run, command.overwrite)
    found = detector.over(task.test, maps=task.test_masks is not None)
    _write_rows(run.scores_file, _score_rows(task, {**found.scores, "p_value": found.p_values}))
    metrics = report(detector, task, config, found, with_baselines=command.baselines)
    run.write_metrics(metrics)
    Console(width=None if sys.stdout.isatty() else 100).print(metrics_table(metrics))
    print("\n".join(explained(metrics)))
    print(f"written to {run.metrics_file}, image by image to {run.scores_file}; next: anomem plot {command.run}")


def _guard_results(run: RunDirectory, overwrite: bool) -> None:
    guard = Guard(overwrite=overwrite)
    guard.require(run.scores_file, "RUN", lambda path: _begins(path, ROWS))
    guard.require(run.metrics_file, "RUN", lambda path: _begins(path, re.compile(rb'\{\s*"task": ')))


def _evaluate_trained(command: Evaluate) -> None:
    from anomem.evaluate.baselines import require_packages
    from anomem.evaluate.report import control, explained, report
    from anomem.scoring import score_images
    from anomem.train.run import load_run

    if command.baselines:
        require_packages()
    run, config, task, scorer = load_run(command.run, device=command.device, root=command.root)
    _guard_results(run, command.overwrite)
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
    print("\n".join(explained(metrics)))
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
    # A measure that no score has needs no column.
    columns = {
        "auroc": "AUROC",
        "average_precision": "AP",
        "fpr_at_95_tpr": "FPR@95%TPR",
        "pixel_auroc": "pixel AUROC",
        "aupro": "AUPRO@30%",
    }
    columns = {measure: heading for measure, heading in columns.items() if measure not in metrics["missing"]}
    for heading in columns.values():
        table.add_column(heading, justify="right")
    groups = {
        "": metrics["scores"],
        **{f"{name}: ": scores for name, scores in metrics["controls"].items()},
        **({"raw pixels: ": metrics["baselines"]} if "same_encoder" not in metrics else {}),
        "same encoder: ": metrics.get("same_encoder", {}),
        "pixels: ": metrics["baselines"] if "same_encoder" in metrics else {},
    }
    for prefix, scores in groups.items():
        # The scores that `anomem score` gives by default come first; the variants of "plain" last.
        first = metrics.get("lead", "stage2")
        for name in sorted(scores, key=lambda name: ("/" in name, name != first, name != "detector")):
            table.add_row(prefix + name, *(f"{scores[name][m]:.4f}" if m in scores[name] else "" for m in columns))
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
    from anomem.train.ranks import joined
    from anomem.train.run import device_named

    # The processes of a job score in their own time, and meet at the end only.
    if command.watch:
        return _watch(command)
    with joined(command.device or device_named(command.run), wait=timedelta(days=7)) as ranks:
        with tempfile.TemporaryDirectory(prefix="anomem-") as scratch:
            failures: list[str] = []
            if ranks.count > 1 and any(str(path) == "-" or _is_stream(path) for path in command.paths):
                raise UserError("`paths`: expected files or folders for a job of several processes, received a stream")
            given = list(dict.fromkeys(_given(command.paths, Path(scratch), failures, command.recursive)))
            if not given and not failures:
                raise UserError("`paths`: expected image files or folders of them, received none")
            rows = _score(command, given, failures, ranks) if given else []
        if not ranks.first:
            return 0
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


def _judge(command: Score) -> tuple[Judge, RunDirectory, TrainConfig | FitConfig]:
    """What scores the images, its run and its configuration."""
    from anomem.train.rundir import RunDirectory

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

    run, config = RunDirectory.open_fitted(command.run, device=command.device, root=command.root)
    detector = load_detector(command.run, device=command.device)
    by = _chosen(command.by, detector.lead, detector.names)
    first = os.environ.get("RANK", "0") == "0"
    calibration, alpha = detector.calibration, command.alpha or detector.alpha
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
        print(
            f"anomem: maps above {threshold:.6g} are anomalous pixels: at most {alpha:.2%} of normal images have any",
            file=sys.stderr,
        )

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
    judge = Judge(detector.model, detector.batch_size, by, columns, shown, together, threshold, calibration.scores[by])
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
    import torch

    from anomem.data import ImageFiles
    from anomem.data.folder import warn_of_unused_range
    from anomem.train.rows import shares

    judge, run, config = ready or _judge(command)
    maps = _places(command, given, run, Path(config.data.root))
    files = ImageFiles(
        [image.file for image in given],
        judge.model.encoder.image_size,
        grey=judge.model.mean.shape[0] == 1,
        letterbox=config.data.letterbox,
        levels=config.data.levels,
        max_megapixels=command.max_megapixels or config.data.max_megapixels,
    )
    if config.data.levels is None:
        warn_of_unused_range(files.paths, files.max_megapixels)

    def judged(pixels: dict[int, Tensor]) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """Number, row and deviations [H, W] of the images that have a score."""
        if not pixels:
            return
        try:
            columns, deviations = judge.columns(torch.stack(list(pixels.values())).to(judge.model.device))
        except ArgumentError as error:  # the fault of one image: each is judged alone
            if len(pixels) == 1:
                failures.extend(f"{given[i].name}: {error}" for i in pixels)
                return
            for i, image in pixels.items():
                yield from judged({i: image})
            return
        for place, i in enumerate(pixels):
            row = {name: values[place] for name, values in columns.items()}
            unfit = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            if unfit:
                failures.append(f"{given[i].name}: its score {unfit[0]} is not finite")
            else:
                yield i, row, deviations[place]

    rows: list[dict[str, Any]] = []
    pictures = outputs.Pictures(command.overlays, command.masks, command.sheet is not None, judge.pixel_threshold)
    # Batch by batch: the maps of a large folder would not fit into memory.
    share = shares(len(given), ranks.count)[ranks.index]
    for start in _progress(range(share.start, share.stop, judge.batch_size), command, len(share)):
        pixels: dict[int, Tensor] = {}
        for i in range(start, min(start + judge.batch_size, share.stop)):
            try:
                pixels[i] = files[i]
            except UserError as error:
                failures.append(str(error).replace(str(given[i].file), given[i].name))
        for i, values, deviation in judged(pixels):
            row = {"path": given[i].name, "kind": None, "anomalous": None, **values}
            rows.append(row)
            if maps:
                try:
                    _write_map(maps[i], deviation.cpu(), given[i].file, files)
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
        listed = [] if ranks.first else failures  # what cannot be listed is listed by all alike
        parts = ranks.all((rows, listed))
        if not ranks.first:
            return rows
        rows = [row for part, _ in parts for row in part]
        failures.extend(name for _, names in parts for name in names if name not in failures)
        for row in rows if command.output is None and judge.decide is None else ():
            _print_row(row, judge.shown, command.json)
    if judge.decide is not None and rows:
        for row, verdict in zip(rows, judge.decide([row["p_value"] for row in rows]), strict=True):
            row["verdict"] = verdict
            if command.output is None:
                _print_row(row, judge.shown, command.json)
    if command.sheet is not None:
        pictures.write_sheet(command.sheet)
    if command.output is not None and rows:
        _write_rows(command.output, rows)
        print(f"{len(rows)} scores written to {command.output}")
    return rows


def _progress(starts: range, command: Score, count: int) -> Iterable[int]:
    """The starts of the batches; a bar on the terminal where there are several and nothing else is printed there."""
    from rich.progress import track

    quiet = command.output is None and sys.stdout.isatty()
    if len(starts) < 2 or quiet or command.watch or not sys.stderr.isatty():
        return starts
    return track(starts, f"scoring {count} images", console=Console(stderr=True), transient=True)


def _watch(command: Score) -> int:
    """Score what arrives in a folder until it is interrupted, and say when the stream drifts.

    A file is scored when its size has not changed for a second, so that one that is still being written is left alone.

    Returns:
        The exit code: 1 where some of the images could not be scored.
    """
    from anomem.drift import Martingale, OnlinePValues
    from anomem.train.ranks import joined

    if len(command.paths) != 1 or not os.path.isdir(command.paths[0]):
        raise UserError("`--watch`: expected one folder")
    if command.fdr is not None or command.sheet is not None:
        raise UserError("`--watch`: expected neither --fdr nor --sheet, which need all images at once")
    ready = _judge(command)
    judge, alone = ready[0], replace(command, output=None)
    p_of = None if judge.calibration is None else OnlinePValues(judge.calibration)
    drift, sizes, done = Martingale(ignore=command.alpha or 0.01), dict[Given, int](), set[Given]()
    rows: list[dict[str, Any]] = []
    failed = 0
    try:
        with joined("cpu", wait=timedelta(days=7)) as ranks:
            while True:
                listed: list[str] = []
                now = {g: size for g in _given(command.paths, Path(), listed, command.recursive) if (size := _size(g))}
                arrived = [g for g, size in now.items() if g not in done and sizes.get(g) == size]
                sizes = now
                done.update(arrived)
                failures: list[str] = []
                new = _score(alone, arrived, failures, ranks, ready) if arrived else []
                rows += new
                failed += len(failures)
                for failure in failures:
                    print(f"anomem: {printable(failure)}", file=sys.stderr)
                for row in new:
                    if p_of is not None and drift.update(p_of(row[judge.by])):
                        print(f"anomem: {drift.sentence()}", file=sys.stderr)
                if new and command.output is not None:
                    _write_rows(command.output, rows)
                sys.stdout.flush()
                time.sleep(1)
    except KeyboardInterrupt:
        seen = f"; {drift.sentence()}" if drift.seen else ""
        print(f"anomem: {len(rows)} images were scored, {failed} could not be{seen}", file=sys.stderr)
    return 1 if failed else 0


def _size(image: Given) -> int:
    """Bytes of a file; 0 where it has gone."""
    try:
        return os.stat(image.file).st_size
    except OSError:
        return 0


def _print_row(row: Mapping[str, Any], shown: Sequence[str], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps({name: value for name, value in row.items() if value is not None}))
        return
    cells = [f"{row[name]:.6g}" if isinstance(row[name], float) else row[name] for name in shown]
    print("\t".join([*cells, printable(row["path"])]))


def _given(paths: Sequence[Path], scratch: Path, failures: list[str], recursive: bool = False) -> Iterator[Given]:
    """The images of files, folders and streams; what cannot be listed is named in `failures`."""
    from anomem.data import image_files
    from anomem.data.folder import image_trees

    for number, path in enumerate(paths):
        try:
            if str(path) != "-" and not _is_stream(path):
                listed = (image_trees if recursive else image_files)(path) if os.path.isdir(path) else [path]
                yield from (Given(str(f), f) for f in listed)
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
    if command.sheet is not None:
        if command.sheet.suffix != ".png":
            raise UserError(f"`--sheet`: expected a .png file, received {command.sheet}")
        guard.require(command.sheet, "--sheet", outputs.is_ours)
    if command.maps is None:
        if command.overlays or command.masks:
            raise UserError(
                f"`--{'overlays' if command.overlays else 'masks'}`: expected --maps, the folder to write to"
            )
        return []
    files = _map_files(command.maps, given, command.paths[0] if command.watch else None)
    for file in files:
        guard.require(file, "--maps", _is_map)
        for suffix, wanted in ((outputs.OVERLAY, command.overlays), (outputs.MASK, command.masks)):
            if wanted:
                guard.require(file.with_suffix(suffix), "--maps", outputs.is_ours)
    if not command.overwrite:
        for folder in {file.parent for file in files}:
            data = [part for name in ("train", "test", "ground_truth") if os.path.isdir(part := root / name)]
            if any(folder.resolve().is_relative_to(part.resolve()) for part in data) or _holds_images(folder):
                raise UserError(
                    f"`--maps`: {folder} is a folder of images; choose another, or add --overwrite to write there"
                )
    return files


def _map_files(folder: Path, images: Sequence[Given], base: Path | None = None) -> list[Path]:
    """One .tiff per image in a folder, laid out as the images are.

    Args:
        folder: of the maps.
        images: all of them.
        base: the folder of the images; the deepest one that holds them all when None.

    Raises:
        UserError: two images differ only in their suffix, so that their maps would be one file, or a link in the
            folder leads out of it.
    """
    # Without "..": with it a map would leave the folder.
    absolute = [Path(os.path.abspath(i.name if str(i.file) == i.name else i.file.name)) for i in images]
    common = os.path.commonpath([path.parent for path in absolute]) if base is None else os.path.abspath(base)
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
        return os.path.isdir(folder) and not all(_is_map(p) or outputs.is_ours(p) for p in image_files(folder))
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


def _write_map(file: Path, deviations: Tensor, image: Path, files: ImageFiles) -> None:
    """Write one deviation map [H, W] as float32, at the size of its image."""
    from PIL import Image

    from anomem.data import upright_size
    from anomem.data.frame import unframed

    resized = unframed(deviations[None], upright_size(image, files.max_megapixels), files.letterbox)[0]
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
    from anomem.plots.run import draw_figures, draw_fitted, figure_files
    from anomem.plots.style import is_figure
    from anomem.train.fitting import load_fitted_run
    from anomem.train.run import load_run
    from anomem.train.rundir import RunDirectory

    guard = Guard(overwrite=command.overwrite)
    for path in figure_files(RunDirectory(command.run).figures).values():
        guard.require(path, "RUN", is_figure)
    if RunDirectory(command.run).is_fitted():
        run, _, task, detector = load_fitted_run(command.run, device=command.device, root=command.root)
        drawn = draw_fitted(task, detector, run.figures)
    else:
        run, config, task, scorer = load_run(command.run, device=command.device, root=command.root)
        drawn = draw_figures(run.rows(), task, scorer, run.figures, config.run.seed)
    for path in drawn:
        print(path)
