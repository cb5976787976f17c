"""From a run directory to report.html: what is shown, and the page that shows it."""

from __future__ import annotations

import datetime
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import anomem
from anomem.data import Task
from anomem.drift import Martingale, OnlinePValues
from anomem.errors import UserError, optional
from anomem.evaluate.baselines import baselines
from anomem.evaluate.fitted import baselines_on_the_encoder, pixel_baselines, verdict_metrics
from anomem.evaluate.metrics import auroc, average_precision, fpr_at_tpr
from anomem.files import Guard, make_folder, write_atomically
from anomem.models import AnoMem
from anomem.report.numbers import RESAMPLES, bootstrap_interval, curve, start_threshold
from anomem.report.pictures import chosen, heat, outline, photo, prototypes, shortened
from anomem.scoring import Calibration, score_images
from anomem.train import FitConfig, TrainConfig, preset
from anomem.train.config import read_json, to_dict
from anomem.train.fitting import load_fitted_run
from anomem.train.run import load_run
from anomem.train.rundir import RunDirectory
from anomem.validation import percent

MOST_IMAGES = 240
"""In the gallery."""
MOST_BYTES = 5_000_000
"""Of the file; the gallery is made smaller until it fits."""
MARK = '<!doctype html>\n<html lang="en">'
TERMS = {"loss": "loss", "perplexity": "prototypes per query", "effective": "prototypes in use"}


class Found(NamedTuple):
    """A run and what it says about its test images."""

    config: FitConfig | TrainConfig
    task: Task
    model: AnoMem
    batch_size: int
    scores: dict[str, Tensor]
    """Name -> [T]."""
    heat: Tensor
    """[T, H, W]."""
    lead: str
    calibration: Calibration | None
    p_values: Tensor | None
    rows: list[dict[str, Any]]
    """Of the training log."""
    rivals: dict[str, Tensor]
    """Baselines, name -> [T]."""
    verdict: dict[str, Any]
    """Promised and measured; empty without a calibration."""


def report_run(
    path: Path,
    output: Path | None = None,
    *,
    device: str | None = None,
    root: str | None = None,
    with_baselines: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the report of a run.

    Args:
        path: the run directory.
        output: the file; RUN/report.html when None.
        device: another one than the run's.
        root: another folder of images than the run's.
        with_baselines: also draw the curves of the baselines.
        overwrite: replace a file that is no report.

    Returns:
        The file.

    Raises:
        UserError: no finished run, no test images, a package is missing, or the file may not be written.
    """
    with optional("the report", "report"):
        import jinja2  # noqa: F401
    output = output or path / "report.html"
    if output.suffix != ".html":
        raise UserError(f"`output`: expected a .html file, received {output}")
    Guard(overwrite=overwrite).require(output, "output", _is_report)
    run = RunDirectory(path)
    if run.is_fitted():
        found = _fitted(path, device, root, with_baselines)
    else:
        found = _trained(path, device, root, with_baselines)
    metrics = read_json(run.metrics_file) if run.metrics_file.exists() else {}
    count = MOST_IMAGES
    while len(text := render(found, path, metrics, count)) > MOST_BYTES and count > 8:
        count = count * 2 // 3
    make_folder(output.parent)
    write_atomically(output, text.encode("utf-8", "backslashreplace"))
    return output


def _fitted(path: Path, device: str | None, root: str | None, with_baselines: bool) -> Found:
    _, config, task, detector = load_fitted_run(path, device=device, root=root)
    said = detector.over(task.test)
    rivals = {}
    if with_baselines:
        rivals = {**baselines_on_the_encoder(detector, task, config.run.seed), **pixel_baselines(task)}
    return Found(
        config, task, detector.model, detector.batch_size, said.scores, said.maps["local"], detector.lead,
        detector.calibration, said.p_values, [], rivals, verdict_metrics(detector, said, task.test_is_anomaly),
    )  # fmt: skip


def _trained(path: Path, device: str | None, root: str | None, with_baselines: bool) -> Found:
    run, config, task, scorer = load_run(path, device=device, root=root)
    scored = score_images(scorer, task.test)
    rivals = baselines(task.to("cpu"), config.run.seed) if with_baselines else {}
    lead = "detector" if scorer.head is None else "stage2"
    return Found(
        config, task, scorer.model, scorer.config.batch_size, scored.scores, scored.maps["detector"], lead, None, None,
        run.rows(), rivals, {},
    )  # fmt: skip


def render(found: Found, path: Path, metrics: dict[str, Any], at_most: int = MOST_IMAGES) -> str:
    """The page.

    Args:
        found: the run and its scores.
        path: the run directory.
        metrics: content of `metrics.json`, or {}.
        at_most: images in the gallery.
    """
    import jinja2

    loader = jinja2.PackageLoader("anomem", "report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    task, labels = found.task, found.task.test_is_anomaly.cpu()
    data = page_data(found, at_most)
    both = bool(labels.any()) and not bool(labels.all())
    named = (
        ("figures", "Figures", True), ("decision", "Decision", True), ("curves", "Curves", both),
        ("images", "Images", True), ("prototypes", "Prototypes", True), ("training", "Training", bool(found.rows)),
        ("drift", "Drift", data["drift"] is not None), ("settings", "Settings", True),
    )  # fmt: skip
    kind = "Fitted" if isinstance(found.config, FitConfig) else "Trained"
    raw = jinja2.utils.markupsafe.Markup
    source = Path(__file__).parent
    text: str = environment.get_template("page.html.jinja").render(
        title=task.name,
        date=datetime.date.today().isoformat(),
        version=anomem.__version__,
        summary=f"{kind} on {int(task.train_is_normal.sum())} normal images"
        + (f" and {int((~task.train_is_normal).sum())} labelled anomalies" if not task.train_is_normal.all() else "")
        + f" of {task.test.size[1]}×{task.test.size[0]} pixels; {len(labels)} test images.",
        command=command_of(found.config, path),
        sections=[(anchor, name) for anchor, name, there in named if there],
        tiles=tiles(found, labels, both),
        rows=table(found, labels, metrics) if both else [],
        pixels=any("pixel_auroc" in values for values in metrics.get("scores", {}).values()),
        notes=[f"Not measured: {reason}." for reason in sorted(set(metrics.get("missing", {}).values()))],
        test_images=len(labels),
        test_anomalies=int(labels.sum()),
        resamples=RESAMPLES,
        data=data,
        gallery_note=""
        if len(labels) == len(data["gallery"])
        else f"{len(data['gallery'])} of {len(labels)}: the worst mistakes, and others evenly by score.",
        prototypes=prototypes(
            found.model, task.train, task.train_is_normal.nonzero().flatten().cpu(), found.batch_size
        ),
        prototypes_note="The most used prototypes of the coarsest scale, each as the images that retrieve it most.",
        drift_note=None if data["drift"] is None else data["drift"]["note"],
        settings=json.dumps(to_dict(found.config), indent=2),
        json=raw(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        style=raw((source / "style.css").read_text(encoding="utf-8")),
        script=raw((source / "script.js").read_text(encoding="utf-8")),
    )
    return text


def page_data(found: Found, at_most: int) -> dict[str, Any]:
    """What the page's script works with."""
    task, labels = found.task, found.task.test_is_anomaly.cpu()
    scores = found.scores[found.lead].double()
    alpha = found.config.alpha if isinstance(found.config, FitConfig) else 0.05
    threshold = start_threshold(scores, labels, found.calibration, found.lead, alpha)
    curves = None
    if bool(labels.any()) and not bool(labels.all()):
        curves = [curve(name, x, labels, name == found.lead, False) for name, x in found.scores.items()]
        curves += [curve(name, x.cpu(), labels, False, True) for name, x in found.rivals.items()]
        curves.sort(key=lambda one: (not one["lead"], -one["auroc"]))
        for one in curves[6:]:
            one["hidden"] = True  # their boxes below the curves bring them back
    calibration = None if found.calibration is None else found.calibration.scores[found.lead].tolist()
    return {
        "by": found.lead,
        "scores": [[score, int(label)] for score, label in zip(scores.tolist(), labels.tolist(), strict=True)],
        "threshold": threshold,
        "calibration": calibration,
        "promise": found.verdict.get("promise"),
        "curves": curves,
        "gallery": gallery(found, labels, threshold, at_most),
        "training": training(found.rows),
        "drift": drift(found, labels),
        "pixelated": max(task.test.size) <= 32,
    }


def drift(found: Found, labels: Tensor) -> dict[str, Any] | None:
    """Capital of a bet that the normal test images differ from the calibration's; None without a calibration."""
    normals = found.scores[found.lead][~labels].double().tolist()
    if found.calibration is None or not normals:
        return None
    p_of = OnlinePValues(found.calibration.scores[found.lead])
    martingale = Martingale().over(p_of(score) for score in normals)
    return {
        "points": [[i + 1, round(value, 4)] for i, value in enumerate(martingale.path)],
        "bound": martingale.bound,
        "note": "The normal test images in their order, as a stream: log10 of the capital of a bet that they are not "
        f"like the calibration's. {martingale.sentence().capitalize()}. A new stream: anomem drift SCORES --run RUN.",
    }


def gallery(found: Found, labels: Tensor, threshold: float, at_most: int) -> list[dict[str, Any]]:
    """Images with their heat maps and masks; see `pictures.chosen`."""
    task, scores = found.task, found.scores[found.lead].double()
    rows = chosen(scores, labels, threshold, at_most)
    names = task.test_paths or [f"test image {i}" for i in range(len(labels))]
    short = shortened(names)
    limits = torch.quantile(found.heat[rows].flatten()[::7].float(), torch.tensor([0.05, 0.995])).tolist()
    items = []
    pictures = [p for batch, _ in task.test.batches(torch.tensor(rows), found.batch_size) for p in batch.cpu()]
    for row, picture in zip(rows, pictures, strict=True):
        item = {
            "name": str(names[row]),
            "short": short[row],
            "kind": task.test_kinds[row],
            "anomalous": int(labels[row]),
            "score": float(scores[row]),
            "image": photo(picture),
            "heat": heat(found.heat[row], *limits),
        }
        if found.p_values is not None:
            item["p"] = float(found.p_values[row])
        if task.test_masks is not None and (edge := outline(task.test_masks[row].cpu())) is not None:
            item["mask"] = edge
        items.append(item)
    return items


def tiles(found: Found, labels: Tensor, both: bool) -> list[dict[str, str]]:
    """The numbers at the top."""
    shown = []
    scores = found.scores[found.lead].double()
    if both:
        low, high = bootstrap_interval(auroc, scores, labels)
        shown.append({"value": f"{auroc(scores, labels):.3f}", "name": f"AUROC of “{found.lead}”",
                      "note": f"{low:.3f} to {high:.3f}"})  # fmt: skip
    verdict = found.verdict
    if "false_alarms" in verdict:
        for count, of, name in (("false_alarms", "normals", "false alarms"), ("found", "anomalies", "anomalies found")):
            if verdict[of]:
                note = f"{verdict[count]} of {verdict[of]}"
                if count == "false_alarms":
                    note += f"; promised {percent(verdict['alpha'])}"
                shown.append({"value": f"{verdict[count] / verdict[of]:.1%}", "name": name, "note": note})
    shown.append({"value": str(int((~labels).sum())), "name": "normal test images", "note": ""})
    kinds = len({kind for kind, anomalous in zip(found.task.test_kinds, labels.tolist(), strict=True) if anomalous})
    note = f"{kinds} kinds" if kinds > 1 else ""
    shown.append({"value": str(int(labels.sum())), "name": "anomalous test images", "note": note})
    return shown


def table(found: Found, labels: Tensor, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Every score and baseline with its intervals; pixel measures are those of `metrics.json`."""
    rows = []
    known = metrics.get("scores", {})
    for name, values in [*found.scores.items(), *found.rivals.items()]:
        x = values.cpu().double()
        row: dict[str, Any] = {"name": name, "lead": name == found.lead, "fpr": f"{fpr_at_tpr(x, labels):.3f}"}
        for measure in (auroc, average_precision):
            low, high = bootstrap_interval(measure, x, labels)
            row[measure.__name__] = f"{measure(x, labels):.3f} ({low:.3f}–{high:.3f})"
        for measure_name in ("pixel_auroc", "aupro"):
            value = known.get(name, {}).get(measure_name)
            row[measure_name] = "" if value is None else f"{value:.3f}"
        rows.append(row)
    return sorted(rows, key=lambda row: not row["lead"])


def training(rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Panels of the logged quantities: title, and lines of one scale each."""
    panels: dict[tuple[str, str], dict[str, list[list[float]]]] = {}
    for row in rows:
        for name, value in row.items():
            term, _, scale = name.partition("/")
            if "step" in row and (term == "loss" or scale) and isinstance(value, (int, float)):
                lines = panels.setdefault((str(row.get("stage", "")), term), {})
                lines.setdefault(scale, []).append([float(row["step"]), float(value)])
    several = len({stage for stage, _ in panels}) > 1
    return [
        {
            "title": (f"{stage}: " if several else "") + TERMS.get(term, term.replace("_", " ")),
            "lines": [{"name": name, "points": points} for name, points in lines.items()],
        }
        for (stage, term), lines in panels.items()
    ] or None


def command_of(config: FitConfig | TrainConfig, path: Path) -> str:
    """The command line that gives a configuration: its options that are not the default ones."""
    if isinstance(config, FitConfig):
        words, start = ["anomem", "fit"], to_dict(FitConfig())
        if config.data.dataset == "folder":
            words.append(config.data.root)
            config = replace(config, data=replace(config.data, root=FitConfig().data.root))
    else:
        name = config.data.dataset
        words, start = ["anomem", "train", "--preset", name], to_dict(preset(name))
    config = replace(config, run=replace(config.run, directory=str(path)))
    words += _options(to_dict(config), start, "")
    return shlex.join(str(word) for word in words)


def _options(values: dict[str, Any], start: dict[str, Any], where: str) -> list[str]:
    words: list[str] = []
    for key, value in values.items():
        option, default = f"--{where}{key}".replace("_", "-"), start.get(key)
        if isinstance(value, dict):
            words += _options(value, default if isinstance(default, dict) else {}, f"{where}{key}.")
        elif isinstance(value, bool) and isinstance(default, bool):
            words += [option if value else f"--{where}no-{key}".replace("_", "-")] if value != default else []
        elif value != default:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096).decode("utf-8", "replace")
    return not head or (head.startswith(MARK) and re.search("– anomem report</title>", head) is not None)
