"""The exported program in eager mode: what the detector says, for every dtype, number of channels and score."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image

from anomem.errors import ArgumentError
from anomem.export import Program
from anomem.export.program import resized_to
from anomem.models import ModelConfig, build_model
from anomem.scoring import FittedDetector, ScoreConfig, Scorer
from anomem.train import fit
from tests.train.test_fitting import CONFIG, parts

# Two implementations read a memory with other roundings, which the Gaussians of few normals enlarge.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_program_says_what_the_detector_says(detector: FittedDetector, pixels: str, portable: bool) -> None:
    images = torch.cat([parts(6, 1), parts(6, 2, defect=True)])
    if pixels == "float32":
        images = images.float() / 255
    for by in detector.names:
        program = Program(detector, by=by, pixels=pixels, portable=portable)
        with torch.no_grad():
            found = dict(zip(program.names, program(images), strict=True))
        said = detector(images, by=by)
        torch.testing.assert_close(found["score"], said.scores[by], **CLOSE)
        torch.testing.assert_close(found["p_value"].double(), said.p_values, rtol=1e-6, atol=0)
        assert torch.equal(found["verdict"], said.verdicts)
        torch.testing.assert_close(found["map"], said.maps["plain" if by == "plain" else "local"], **CLOSE)


def test_every_alpha_decides_as_the_calibration_does(detector: FittedDetector) -> None:
    """k/(n + 1) is a rounded number: the threshold is a count, so that no alpha is off by one."""
    images, n = torch.cat([parts(20, 1), parts(4, 2, defect=True)]), detector.calibration.count
    for k in range(1, n + 1):
        program = Program(detector, alpha=k / (n + 1))
        with torch.no_grad():
            verdict = program(images)[2]
        assert torch.equal(verdict, detector(images, k / (n + 1)).verdicts), k


@pytest.mark.parametrize("size", [(64, 64), (31, 100), (129, 64), (200, 333)])
def test_matrices_resize_as_torch_does(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size) * 255
    torch.testing.assert_close(resized_to(images, (64, 48), True), resized_to(images, (64, 48), False))
    assert torch.equal(resized_to(images, size, True), images)


def test_colour_becomes_grey_as_files_are_read() -> None:
    colour = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    grey = torch.stack(
        [torch.from_numpy(np.array(Image.fromarray(x.movedim(0, -1).numpy()).convert("L"))) for x in colour]
    )[:, None]
    model = build_model(ModelConfig(prototypes=(4,)), (16, 16), 1, mean=[0.5], std=[0.2])
    scorer = Scorer(model, "pooled", ScoreConfig())
    program = Program(scorer, channels=3)
    assert program.names == ("score", "map")
    with torch.no_grad():
        score, heat = program(colour)
    said = scorer(grey)
    torch.testing.assert_close(score, said.scores["detector"])
    torch.testing.assert_close(heat, said.maps["detector"])


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (200, 71), (33, 64)])
def test_letterboxed_images_keep_their_aspect_ratio(detector: FittedDetector, size: tuple[int, int]) -> None:
    boxed = copy.copy(detector)
    boxed.letterbox = True
    images = torch.nn.functional.interpolate(parts(4, 2, defect=True).float(), size).to(torch.uint8)
    program = Program(boxed, pixels="float32")
    with torch.no_grad():
        score, *_, heat = program(images.float() / 255)
    said = boxed(images.float() / 255)
    torch.testing.assert_close(score, said.scores[boxed.lead], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(heat, said.maps["local"], rtol=1e-4, atol=1e-3)


def test_grey_becomes_colour(detector: FittedDetector) -> None:
    grey = parts(3, 1)[:, :1].contiguous()
    with torch.no_grad():
        score = Program(detector, channels=1)(grey)[0]
    torch.testing.assert_close(score, detector(grey.expand(-1, 3, -1, -1)).scores[detector.lead], **CLOSE)


def test_what_cannot_be_promised_is_left_out() -> None:
    few = fit(parts(8), alpha=0.01, config=CONFIG)
    assert Program(few).names == ("score", "p_value", "map")
    with pytest.raises(ArgumentError, match="alpha"):
        Program(few, alpha=0.01)


def test_wrong_arguments(detector: FittedDetector) -> None:
    for arguments, name in (({"by": "energy"}, "by"), ({"channels": 4}, "channels"), ({"pixels": "int8"}, "pixels")):
        with pytest.raises(ArgumentError, match=name):
            Program(detector, **arguments)
    model = build_model(ModelConfig(prototypes=(4,)), (16, 16), 1, mean=[0.5], std=[0.2])
    with pytest.raises(ArgumentError, match="not calibrated"):
        Program(Scorer(model, "pooled", ScoreConfig()), alpha=0.1)


def test_the_source_is_left_as_it_is(detector: FittedDetector) -> None:
    before = io.BytesIO()
    torch.save(detector.state_dict(), before)
    impl = [memory.impl for memory in detector.model.memories]
    Program(detector)
    after = io.BytesIO()
    torch.save(detector.state_dict(), after)
    assert before.getvalue() == after.getvalue()
    assert [memory.impl for memory in detector.model.memories] == impl
