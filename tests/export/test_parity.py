"""The check of an exported file where rounding decides which prototype a feature reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from anomem.export import Program, compared
from anomem.export.parity import TOLERANCE, eager, read_ties
from anomem.reference.retrieve import normalize_rows
from anomem.scoring import FittedDetector
from tests.train.test_fitting import parts


@pytest.fixture(scope="module")
def images() -> Tensor:
    return parts(8, 5)


@pytest.fixture(scope="module")
def torn(detector: FittedDetector, images: Tensor) -> tuple[FittedDetector, FittedDetector]:
    """A feature of the first image lies between its 8th and 9th prototypes: two detectors decide either way.

    The 9th becomes the reflection of the 8th across the feature, which has the same score.
    """
    pair = []
    for nudge in (1e-6, -1e-6):
        found = copy.deepcopy(detector)
        memory = found.model.memories[0]
        z = normalize_rows(found.model.queries(found.model(images))[0][0, 0].float(), memory.normalize)
        keys = normalize_rows(memory.prototypes.detach(), memory.normalize)
        order = (keys @ z).argsort(descending=True)
        eighth = keys[order[7]]
        keys[order[8]] = (2 * (z @ eighth) / (z @ z)) * z - eighth + nudge * z
        with torch.no_grad():
            memory.prototypes.copy_(keys)
        pair.append(found)
    return pair[0], pair[1]


def test_a_tie_between_prototypes_is_no_difference(torn: tuple[FittedDetector, FittedDetector], images: Tensor) -> None:
    one, other = torn
    program = Program(other)
    apart = (one(images).maps["local"] - other(images).maps["local"]).abs().amax(dim=(1, 2))
    assert float(apart[0]) > TOLERANCE * float(one(images).maps["local"].max()), "the two read other prototypes"
    with torch.no_grad():
        parity = compared(one, program, lambda given: list(program(given)), images)
    assert parity.passed, parity
    assert parity.read_ties == int(read_ties(one, images, True).sum()) >= 1
    assert parity.of_read_ties > TOLERANCE
    assert "rounding decides which prototype" in parity.sentence()


def test_other_differences_are_not_excused(torn: tuple[FittedDetector, FittedDetector], images: Tensor) -> None:
    """A wrong map of an image without a tie, and a map that is far off or no number in one with a tie."""
    one, other = torn
    program = Program(other)
    clear = int((~read_ties(one, images, True)).nonzero()[0])
    for place, value in ((clear, 1.01), (0, 3.0), (0, float("nan"))):

        def wrong(given: Tensor, place: int = place, value: float = value) -> list[Tensor]:
            found = [x.clone() for x in program(given)]
            found[-1][place] *= value
            return found

        with torch.no_grad():
            assert not compared(one, program, wrong, images).passed, (place, value)


def test_no_tie_is_looked_for_where_all_prototypes_are_read(detector: FittedDetector, images: Tensor) -> None:
    whole = copy.deepcopy(detector)
    whole.scorer.top_k = None
    assert not bool(read_ties(whole, images, True).any())
    assert eager(detector, Program(detector), images, True)[0].shape == (8,)
