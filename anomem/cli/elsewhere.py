"""Commands that take a run elsewhere: export, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


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
