"""Runs as files that other programs load: torch.export, ONNX and OpenVINO, from pixels to the verdict."""

from anomem.export.formats import FORMATS, Format
from anomem.export.parity import Parity, compared
from anomem.export.program import Pixels, Program
from anomem.export.run import Exported, export, export_run

__all__ = ["FORMATS", "Exported", "Format", "Parity", "Pixels", "Program", "compared", "export", "export_run"]
