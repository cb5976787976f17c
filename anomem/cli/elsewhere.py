"""Commands that take a run elsewhere: export, report, drift."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from anomem.errors import UserError


@dataclass(frozen=True)
class Export:
    """Write a run as one file that other programs load: pixels in; score, p-value, verdict and map out."""

    run: tyro.conf.Positional[Path]
    """Run directory of `anomem fit` or `anomem train`."""
    format: Literal["pt2", "onnx", "openvino"] = "onnx"
    """pt2 is read by torch.export, onnx by ONNX Runtime, openvino by OpenVINO."""
    output: Path | None = None
    """The file (.pt2, .onnx or .xml); RUN/export/model.SUFFIX when not given. Its metadata go into FILE.json."""
    by: str | None = None
    """Which score; see `anomem score --by`."""
    alpha: float | None = None
    """Fitted run: false-alarm rate of the verdict; that of the fit when not given."""
    pixels: Literal["uint8", "float32"] = "uint8"
    """Dtype of the images; float32 is in [0, 1]."""
    channels: Literal[1, 3] | None = None
    """Of the images; those that the run was made with when not given."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Folder of the run's images where they have moved; they are only used to check the file."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True)
class Report:
    """Write one HTML file about a run: figures, a threshold to drag, curves, images with heat maps, training."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    output: Path | None = None
    """The .html file; RUN/report.html when not given."""
    baselines: bool = True
    """Also show the baselines; they are fitted anew."""
    device: str | None = None
    """In place of the run's: cpu, cuda or cuda:N."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Folder of the run's images where they have moved."""
    overwrite: bool = False
    """Replace a file that is no report."""


@dataclass(frozen=True)
class Drift:
    """Say whether scores in a file, in their order, still come from the calibration's normals; exits with 1 if not."""

    scores: tyro.conf.Positional[Path]
    """A .csv or .json file of `anomem score --output`, or .jsonl of --json, of a fitted run."""
    run: Path | None = None
    """The run: its calibration makes the bound on false alarms exact."""
    false_alarm: float = 0.01
    """At most this part of streams without drift raise the alarm."""
    ignore: float = 0.01
    """p-values up to this are anomalies and no evidence of drift; 0 counts all."""


def export(command: Export) -> None:
    """Export a run and print what was written, how it was checked and how it is loaded."""
    from anomem.export import export_run

    done = export_run(
        command.run,
        command.format,
        command.output,
        by=command.by,
        alpha=command.alpha,
        pixels=command.pixels,
        channels=command.channels,
        root=command.root,
        overwrite=command.overwrite,
    )
    about = done.metadata
    taken = about["input"]
    print(f"takes: {taken['name']} [{', '.join(map(str, taken['shape']))}] {taken['dtype']}, {taken['meaning']}")
    for given in about["outputs"]:
        print(f"gives: {given['name']} [{', '.join(given['shape'])}] {given['dtype']}, {given['meaning']}")
    if about["calibration_normals"] is None:
        print("no p-value, no verdict: the run is not calibrated; `anomem fit` makes runs that say yes or no")
    elif about["alpha"] is None:
        print(f"no verdict: {about['promise']}; see --alpha")
    else:
        print(f"verdict at alpha {about['alpha']:g}: {about['promise']}")
    print(f"checked: {done.parity.sentence()}; {about['images_of']}")
    print(f"load it: {about['load']}")
    print(f"written to {done.file}, described in {done.metadata_file}")


def report(command: Report) -> None:
    """Write the report of a run and print its file."""
    from anomem.report import report_run

    written = report_run(
        command.run,
        command.output,
        device=command.device,
        root=command.root,
        with_baselines=command.baselines,
        overwrite=command.overwrite,
    )
    print(f"written to {written} ({written.stat().st_size / 1e6:.1f} MB); open it in a browser")


def drift(command: Drift) -> int:
    """Bet against a stream of scores and print what it showed.

    Returns:
        The exit code: 1 where it drifts.
    """
    from anomem.drift import Martingale, OnlinePValues, column, read_rows, steps_of

    rows = read_rows(command.scores)
    martingale = Martingale(command.false_alarm, command.ignore)
    if command.run is None:
        p_values = column(rows, "p_value", command.scores)
        right = all(0 < p <= 1 for p in p_values)
        if not right:
            raise UserError(f"{command.scores}: expected p-values above 0 and at most 1, received others")
        martingale.steps = steps_of(p_values)
        martingale.over(p_values)
    else:
        from anomem.train import load_detector

        detector = load_detector(command.run, device="cpu")
        p_of = OnlinePValues(detector.calibration.scores[detector.lead])
        martingale.over(p_of(score) for score in column(rows, detector.lead, command.scores))
    print(martingale.sentence())
    return 0 if martingale.alarm_at is None else 1
