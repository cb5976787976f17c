"""Whether an exported file says what the run itself says: scores, p-values, verdicts and maps on the same images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anomem.export.formats import Runner
from anomem.export.program import Program, grey_of
from anomem.scoring import FittedDetector, Scorer
from anomem.validation import require

TOLERANCE = 1e-5
"""Largest difference of maps as a part of the largest value, of scores as a part of what `size_of_score` says."""
COUNT = 64
"""Images to compare."""


class Parity(NamedTuple):
    """Largest differences between a file and the run on the same images."""

    images: int
    """Compared."""
    score: float
    """Largest difference as a part of `size_of_score`."""
    map: float
    """Largest difference as a part of the largest value of any map."""
    p_values: int
    """That differ although the score is further than the tolerance from every calibration score."""
    verdicts: int
    """That differ likewise."""
    ties: int
    """Images whose score is a calibration score up to the tolerance: rounding decides their p-value."""

    @property
    def passed(self) -> bool:
        """Whether scores and maps are within `TOLERANCE` and no p-value and no verdict differs."""
        return max(self.score, self.map) <= TOLERANCE and self.p_values == self.verdicts == 0

    def sentence(self) -> str:
        """In words."""
        text = f"scores differ by {self.score:.1e}, maps by {self.map:.1e}"
        if self.p_values or self.verdicts:
            text += f", {self.p_values} p-values and {self.verdicts} verdicts differ"
        return f"{text} ({self.images} images)"


def compared(source: FittedDetector | Scorer, program: Program, runner: Runner, images: Tensor) -> Parity:
    """Run a file and the eager scorer on the same images.

    Args:
        source: that the program was made of.
        program: names the outputs.
        runner: of the file.
        images: [B, C, H, W] uint8 with the channels of the program.
    """
    require(images.dtype == torch.uint8, "images", "uint8", images.dtype)
    given = images if program.pixels == "uint8" else images.float() / 255
    found = dict(zip(program.names, runner(given), strict=True))
    own = source.model.mean.shape[0]
    score, heat, p_values, verdicts = eager(source, program, own_channels(images, own), program.pixels == "uint8")
    size = size_of_score(source, program.by, score)
    ties = wrong_p = wrong_verdicts = 0
    if p_values is not None:
        far = distance_to_calibration(score, program.calibration) > TOLERANCE * size
        ties = int((~far).sum())
        wrong_p = int(((found["p_value"].double() - p_values).abs() > 1e-6)[far].sum())
        if verdicts is not None:
            wrong_verdicts = int((found["verdict"].bool() != verdicts)[far].sum())
    of_map = _difference(found["map"], heat, max(float(heat.abs().max()), 1e-30))
    return Parity(len(images), _difference(found["score"], score, size), of_map, wrong_p, wrong_verdicts, ties)


def size_of_score(source: FittedDetector | Scorer, by: str, scores: Tensor) -> float:
    """The numbers whose rounding a score [B] carries: the largest score, and what is subtracted from its parts.

    "both" and "either" are parts relative to their mean over normals. Of normals they are near zero, however exact.
    """
    size = float(scores.abs().max())
    if isinstance(source, FittedDetector) and by in ("both", "either", "labelled"):
        scorer = source.scorer
        subtracted = (scorer.centre / scorer.spread).abs()
        lead = scorer.lead if by == "labelled" else by
        offset = float((subtracted[:2] if lead == "both" else subtracted[1:]).sum())
        size += offset if source.labels is None or by != "labelled" else offset / float(source.labels.one_class_spread)
    return max(size, 1e-30)


def eager(
    source: FittedDetector | Scorer, program: Program, images: Tensor, whole: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the run says: score [B], map [B, H, W], p-values and verdicts [B] or None; on the CPU.

    Args:
        source: of the program.
        program: names score and map.
        images: [B, C, H, W] uint8 with the channels of the model.
        whole: whether the pixels stay uint8, else they become floating.
    """
    images = images if whole else images.float() / 255
    if isinstance(source, FittedDetector):
        said = source(images, program.alpha if "verdict" in program.names else None, program.by)
        verdicts = None if said.verdicts is None else said.verdicts.cpu()
        return said.scores[program.by].cpu(), said.maps[program.map_name].cpu(), said.p_values.cpu(), verdicts
    scored = source(images.to(source.model.device))
    return scored.scores[program.by].cpu(), scored.maps[program.map_name].cpu(), None, None


def own_channels(images: Tensor, channels: int) -> Tensor:
    """Images [B, C', H, W] uint8 with the channels of a model, as its reader of files makes them."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    return grey_of(images).to(torch.uint8)


def distance_to_calibration(scores: Tensor, calibration: Tensor) -> Tensor:
    """From each score [B] to the nearest of the sorted calibration scores [n]."""
    return (scores[:, None].cpu() - calibration[None].cpu()).abs().amin(dim=1)


def _difference(found: Tensor, expected: Tensor, size: float) -> float:
    return float((found.double() - expected.double()).abs().max()) / size
