"""From a run, or a scorer in memory, to a checked file and the metadata beside it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anomem
from anomem.data import Images, load_task
from anomem.errors import UserError
from anomem.export.formats import FORMATS, Format
from anomem.export.parity import COUNT, TOLERANCE, Parity, compared
from anomem.export.program import Pixels, Program
from anomem.files import Guard, make_folder, write_atomically
from anomem.scoring import FittedDetector, Scorer
from anomem.train import load_detector, load_scorer
from anomem.train.config import FitConfig, TrainConfig, read_json, to_dict
from anomem.train.rundir import RunDirectory
from anomem.validation import require_choice

VERSION = 1
"""Of the metadata."""
MARK = "anomem_export"
"""Key of the metadata's version, by which a file is known to be ours."""
MEANINGS = {
    "score": "how anomalous the image is; higher is more anomalous",
    "p_value": "share of the calibration normals, the image among them, that score at least as high",
    "verdict": "True: anomalous, p ≤ alpha",
    "map": "how anomalous each pixel is, at the size of the image; higher is more anomalous",
}
DTYPES = {"score": "float32", "p_value": "float32", "verdict": "bool", "map": "float32"}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    """To load."""
    metadata_file: Path
    """Says shapes, names, meanings, and what the check found."""
    metadata: dict[str, Any]
    """Its content."""
    parity: Parity
    """On images of the model's size."""


def export_run(
    path: Path,
    format: str = "onnx",
    output: Path | None = None,
    *,
    by: str | None = None,
    alpha: float | None = None,
    pixels: Pixels = "uint8",
    channels: int | None = None,
    root: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a run of `anomem fit` or `anomem train`.

    Args:
        path: the run directory.
        format: "pt2", "onnx" or "openvino".
        output: the file; RUN/export/model.SUFFIX when None.
        by, alpha, pixels, channels: see `Program`.
        root: folder of the run's images, where they have moved; they are read for the check only.
        overwrite: replace an existing file.

    Raises:
        UserError: no finished run, a missing package, an existing file, or a file that does not say what the run says.
    """
    _known(format).require()
    fitted = RunDirectory(path).is_fitted()
    open_run, load = (RunDirectory.open_fitted, load_detector) if fitted else (RunDirectory.open, load_scorer)
    source: FittedDetector | Scorer = load(path, device="cpu")  # type: ignore[operator]
    run, config = open_run(path, device="cpu", root=root)  # type: ignore[operator]
    output = output or path / "export" / f"model{_known(format).suffix}"
    images, name = check_images(source, run, config)
    about = {"run": path.resolve().name, "images_of": name, "config": to_dict(config)}
    return export(
        source, format, output, by=by, alpha=alpha, pixels=pixels, channels=channels, letterbox=config.data.letterbox,
        images=images, about=about, overwrite=overwrite,
    )  # fmt: skip


def export(
    source: FittedDetector | Scorer,
    format: str,
    output: Path,
    *,
    by: str | None = None,
    alpha: float | None = None,
    pixels: Pixels = "uint8",
    channels: int | None = None,
    letterbox: bool | None = None,
    images: Tensor | None = None,
    about: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a detector or a scorer as one file, check it against the eager one, and describe it.

    Args:
        source: a fitted detector or a scorer.
        format: "pt2", "onnx" or "openvino".
        output: the file.
        by, alpha, pixels, channels, letterbox: see `Program`.
        images: [B, C, H, W] uint8 of the model's size to check with; smooth noise when None.
        about: more for the metadata.
        overwrite: replace an existing file.

    Raises:
        UserError: a missing package, an existing file, or a file that does not say what the source says.
    """
    kind = _known(format)
    kind.require()
    if output.suffix != kind.suffix:
        raise UserError(f"`output`: expected a {kind.suffix} file, received {output}")
    metadata_file = output.with_name(output.name + ".json")
    guard = Guard(overwrite=overwrite)
    for file in (output, metadata_file, *([output.with_suffix(".bin")] if kind.suffix == ".xml" else [])):
        if file.exists() and not overwrite:
            raise UserError(f"`output`: {file} exists; choose another name, or add --overwrite")
        guard.require(file, "output", lambda _: False)
    program = Program(
        source, by=by, alpha=alpha, pixels=pixels, channels=channels, letterbox=letterbox, portable=kind.portable
    )
    contents = kind.contents(program)
    given = _channels(noise(source) if images is None else images, program.channels)
    with tempfile.TemporaryDirectory(prefix="anomem-") as folder:
        place = Path(folder, "model")
        for suffix, content in contents.items():
            place.with_suffix(suffix).write_bytes(content)
        runner = kind.runner(place.with_suffix(kind.suffix))
        parity = compared(source, program, runner, given)
        resized = None
        if isinstance(source, FittedDetector):
            resized = compared(source, program, runner, _stretched(given[:8]))
    if not parity.passed:
        raise UserError(f"the {format} file does not say what the run says: {parity.sentence()}; it was not written")
    digests = {output.with_suffix(s).name: hashlib.sha256(content).hexdigest() for s, content in contents.items()}
    metadata = {
        **described(program, source, kind, output.name),
        "sha256": digests,
        "parity": {**parity._asdict(), "tolerance": TOLERANCE, "passed": True},
        "parity_resized": None if resized is None else resized._asdict(),
        "images_of": "noise",
        **(about or {}),
    }
    make_folder(output.parent)
    for suffix, content in contents.items():  # the file that is loaded comes last
        write_atomically(output.with_suffix(suffix), content)
    text = json.dumps(metadata, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(metadata_file, (text + "\n").encode("utf-8", "backslashreplace"))
    return Exported(output, metadata_file, metadata, parity)


def described(program: Program, source: FittedDetector | Scorer, kind: Format, name: str) -> dict[str, Any]:
    """The part of the metadata that does not depend on the files' content."""
    shapes = {"map": ["B", "H", "W"]}
    calibration = source.calibration if isinstance(source, FittedDetector) else None
    meaning = "whole numbers 0 to 255" if program.pixels == "uint8" else "numbers from 0 to 1"
    return {
        MARK: VERSION,
        "anomem": anomem.__version__,
        "file": name,
        "load": kind.load.replace("FILE", repr(name)),
        "packages": {"torch": torch.__version__, **kind.versions()},
        "input": {
            "name": "images",
            "shape": ["B", program.channels, "H", "W"],
            "dtype": program.pixels,
            "meaning": f"{'grey' if program.channels == 1 else 'red, green, blue'}, {meaning}; any B ≥ 1, H and W",
        },
        "outputs": [
            {"name": n, "shape": shapes.get(n, ["B"]), "dtype": DTYPES[n], "meaning": MEANINGS[n]}
            for n in program.names
        ],
        "resized_to": list(program.model.encoder.image_size),
        "letterbox": program.letterbox,
        "score": program.by,
        "alpha": program.alpha if "verdict" in program.names else None,
        "promise": calibration.promise(program.alpha) if calibration and program.alpha else None,
        "calibration_normals": calibration.count if calibration else None,
    }


def check_images(
    source: FittedDetector | Scorer, run: RunDirectory, config: FitConfig | TrainConfig
) -> tuple[Tensor, str]:
    """Images [B, C, h, w] uint8 to check a run with, and what they are; noise where its data are not to be found."""
    given = read_json(run.given_file) if run.given_file.exists() else []
    if "task" in given:
        return noise(source), "noise, since the images were given from Python"
    try:
        task = load_task(config.data, run.split())
    except UserError as error:
        return noise(source), f"noise, since the images of the run cannot be read: {error}"
    images, kind = (task.test, "test") if len(task.test) else (task.train, "training")
    return _some(images), f"{kind} images of {task.name}"


def noise(source: FittedDetector | Scorer, count: int = COUNT) -> Tensor:
    """Smooth noise [count, C, h, w] uint8 with the mean and spread of the model's normalisation."""
    model = source.model
    height, width = model.encoder.image_size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, model.mean.shape[0], max(2, height // 4), max(2, width // 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return ((model.mean.cpu() + model.std.cpu() * smooth).clamp(0, 1) * 255).round().to(torch.uint8)


def _some(images: Images) -> Tensor:
    order = torch.linspace(0, len(images) - 1, min(COUNT, len(images))).round().long()
    return torch.cat([batch.cpu() for batch, _ in images.batches(order, COUNT)])


def _channels(images: Tensor, channels: int) -> Tensor:
    """Images of a model as a program of another number of channels gets them."""
    if images.shape[1] == channels:
        return images
    return images.expand(-1, 3, -1, -1) if channels == 3 else images[:, :1]


def _stretched(images: Tensor) -> Tensor:
    """The same images, larger and not square."""
    size = (images.shape[2] * 3 // 2 + 1, images.shape[3] * 5 // 4)
    return torch.nn.functional.interpolate(images.float(), size, mode="bilinear").round().to(torch.uint8)


def _known(format: str) -> Format:
    require_choice(format, "format", tuple(FORMATS))
    return FORMATS[format]
