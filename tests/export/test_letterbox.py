"""A grey, letterboxed, rectangular run in every format: what the file says of images of other shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomem.data import DataConfig
from anomem.export import FORMATS, Exported, Program, compared, export_run
from anomem.export.parity import eager
from anomem.scoring import FittedDetector
from anomem.train import fit_run, fitting, load_detector
from tests.export.conftest import once_each
from tests.train.test_fitting import CONFIG, parts, write


def photos(count: int, height: int, width: int, seed: int = 0, defect: bool = False) -> Tensor:
    """[count, 1, height, width] uint8: `parts` in grey, stretched."""
    grey = parts(count, seed, defect)[:, :1].float()
    return F.interpolate(grey, (height, width), mode="bilinear").round().to(torch.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted to tall photographs that are letterboxed into 48×64."""
    folder = tmp_path_factory.mktemp("grey")
    write(folder / "photos" / "train" / "good", photos(24, 100, 70).expand(-1, 3, -1, -1))
    write(folder / "photos" / "test" / "good", photos(6, 100, 70, 1).expand(-1, 3, -1, -1))
    write(folder / "photos" / "test" / "spot", photos(6, 100, 70, 2, defect=True).expand(-1, 3, -1, -1))
    data = DataConfig(
        dataset="folder", normal="", root=str(folder / "photos"), image_size=(48, 64), letterbox=True, grey=True
    )
    settings = replace(CONFIG.run, directory=str(folder / "run"))
    config = replace(CONFIG, data=data, encoder="small", weights="default", scales=(), alpha=0.1, run=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "SMALL_STEPS", 2)  # what is tested does not depend on the training
        return fit_run(config, quiet=True)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The file of a format."""
    folder = tmp_path_factory.mktemp("export")
    return once_each(lambda name, file: export_run(run, name, file, channels=3), folder)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_letterboxes_as_the_run_does(exported: Callable[[str], Exported], run: Path, name: str) -> None:
    """Colour into a grey run; images of the frame's shape, taller, wider and smaller ones."""
    done = exported(name)
    assert (done.metadata["letterbox"], done.metadata["resized_to"]) == (True, [48, 64])
    assert done.metadata["images_of"].startswith("test images of")
    assert done.parity.passed
    detector: FittedDetector = load_detector(run)
    assert (detector.letterbox, detector.model.mean.shape[0]) == (True, 1)
    program, runner = Program(detector, channels=3), FORMATS[name].runner(done.file)
    for height, width in ((48, 64), (100, 70), (45, 200), (31, 30)):
        images = torch.cat([photos(5, height, width, 5), photos(3, height, width, 6, defect=True)])
        parity = compared(detector, program, runner, images.expand(-1, 3, -1, -1).contiguous())
        assert parity.verdicts == 0, (height, width)
        # Of another size a grey level half-way may be rounded to the other side.
        limit = 1e-5 if (height, width) == (48, 64) else 5e-3
        assert max(parity.score, parity.map) < limit, (height, width, parity)


def test_the_check_notices_a_stretched_image(run: Path) -> None:
    """What a program that ignores the letterbox says lies outside of the limit above."""
    detector = load_detector(run)
    stretching = Program(detector, channels=1, letterbox=False)
    with torch.no_grad():
        parity = compared(detector, stretching, lambda images: list(stretching(images)), photos(8, 45, 200, 5))
    assert min(parity.score, parity.map) > 5e-3
    score, heat, *_ = eager(detector, stretching, photos(2, 45, 200, 5), whole=True)
    assert (score.shape, heat.shape) == ((2,), (2, 45, 200))
