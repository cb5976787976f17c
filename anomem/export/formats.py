"""The three formats: how a program is written, and how its file is run again without this package."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.errors import optional
from anomem.export.program import Program, traced

Runner = Callable[[Tensor], list[Tensor]]
"""Images -> the outputs that `Program.names` lists."""
OPSET = 18
"""Of ONNX; onnxruntime ≥ 1.14 and OpenVINO ≥ 2023 run it."""


@dataclass(frozen=True)
class Format:
    """One file format."""

    suffix: str
    """Of the file that is loaded."""
    portable: bool
    """Whether resizing is written as products with matrices; see `Program`."""
    packages: tuple[str, ...]
    """Distributions that write and run it."""
    contents: Callable[[Program], dict[str, bytes]]
    """Suffix -> content of each file."""
    runner: Callable[[Path], Runner]
    """Loads a file to run it on the CPU with one thread for each that torch has."""
    load: str
    """How to load and run it, as Python with FILE and images."""

    def require(self) -> None:
        """Check that the packages are there.

        Raises:
            UserError: one is missing.
        """
        for name in self.packages:
            with optional(f"the format of {self.suffix} files", "export"):
                __import__(name)

    def versions(self) -> dict[str, str]:
        """Of the packages."""
        found = {}
        for name in self.packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # built from source without metadata
                found[name] = "unknown"
        return found


def _pt2(program: Program) -> dict[str, bytes]:
    graph = traced(program)
    # The example images are the only part of the file that torch would write with pickle.
    graph._example_inputs = None
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # about channels-last weights, which are saved as they are
        warnings.simplefilter("ignore", UserWarning)
        torch.export.save(graph, buffer)
    return {".pt2": buffer.getvalue()}


def _run_pt2(file: Path) -> Runner:
    module = torch.export.load(file).module()

    @torch.no_grad()
    def run(images: Tensor) -> list[Tensor]:
        return list(module(images))

    return run


def _onnx(program: Program) -> dict[str, bytes]:
    with _quiet("onnxscript", "onnx_ir", "torch.onnx"):
        written: Any = torch.onnx.export(
            traced(program),
            (),
            dynamo=True,
            input_names=["images"],
            output_names=list(program.names),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: _sorted},
            verbose=False,
        )
    return {".onnx": written.model_proto.SerializeToString()}


def _sorted(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """ONNX's TopK in place of torch's stable sort: of equal values the one with the lower index comes first in both."""
    from onnxscript import opset18

    size = opset18.Gather(opset18.Shape(x), opset18.Constant(value_ints=[dim]))
    return opset18.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _run_onnx(file: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]

    return run


def _openvino(program: Program) -> dict[str, bytes]:
    import openvino

    with tempfile.TemporaryDirectory(prefix="anomem-") as folder:
        place = Path(folder, "model.xml")
        model = openvino.Core().read_model(_onnx(program)[".onnx"])
        openvino.save_model(model, place, compress_to_fp16=False)
        return {suffix: place.with_suffix(suffix).read_bytes() for suffix in (".bin", ".xml")}


def _run_openvino(file: Path) -> Runner:
    import openvino

    # Without the hint a CPU with bfloat16 instructions computes in bfloat16.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    model = openvino.Core().compile_model(file, "CPU", settings)

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found.copy()) for found in model(images.numpy()).values()]

    return run


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Without the warnings of some loggers about what they leave as it is."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


FORMATS: dict[str, Format] = {
    "pt2": Format(
        ".pt2",
        portable=False,
        packages=("torch",),
        contents=_pt2,
        runner=_run_pt2,
        load="torch.export.load(FILE).module()(images)  # images: torch.Tensor",
    ),
    "onnx": Format(
        ".onnx",
        portable=True,
        packages=("onnx", "onnxscript", "onnxruntime"),
        contents=_onnx,
        runner=_run_onnx,
        load='onnxruntime.InferenceSession(FILE).run(None, {"images": images})  # images: numpy array',
    ),
    "openvino": Format(
        ".xml",
        portable=True,
        packages=("onnx", "onnxscript", "openvino"),
        contents=_openvino,
        runner=_run_openvino,
        load='openvino.Core().compile_model(FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)  # numpy array',
    ),
}
"""Name on the command line -> format."""
