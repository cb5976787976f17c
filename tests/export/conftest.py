"""One small fitted detector, and its file in each format that can be written here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anomem.errors import UserError
from anomem.export import FORMATS, Exported, export, formats
from anomem.scoring import FittedDetector
from anomem.train import fit
from tests.train.test_fitting import CONFIG, parts

# pytest's handler would have torch put every step of its tracing into words.
logging.getLogger("torch.__trace").disabled = True


@pytest.fixture(scope="session")
def detector() -> FittedDetector:
    """One scale of 8×8 positions: tracing takes seconds for each layer."""
    return fit(parts(24), alpha=0.1, config=replace(CONFIG, scales=("block3",)))


def once_each(write: Callable[[str, Path], Exported], folder: Path) -> Callable[[str], Exported]:
    """Gives the file of a format, written once; skips a test of one that cannot be written here.

    Args:
        write: makes the file of a format at a path.
        folder: of a folder for each format.
    """
    done: dict[str, Exported] = {}

    def of(name: str) -> Exported:
        try:
            FORMATS[name].require()
        except UserError as reason:
            pytest.skip(str(reason))
        if name not in done:
            with pytest.MonkeyPatch.context() as patch:
                if name == "openvino":  # is made from the ONNX file, which is not written twice
                    content = of("onnx").file.read_bytes()
                    patch.setattr(formats, "_onnx", lambda _: {".onnx": content})
                (folder / name).mkdir()
                done[name] = write(name, folder / name / f"model{FORMATS[name].suffix}")
        return done[name]

    return of


@pytest.fixture(scope="session")
def exported(detector: FittedDetector, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The file of a format."""
    images = parts(64, 5)
    return once_each(lambda name, file: export(detector, name, file, images=images), tmp_path_factory.mktemp("export"))
