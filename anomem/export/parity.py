"""Whether an exported file says what the run itself says: scores, p-values, verdicts and maps on the same images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anomem.data.convert import grey_of
from anomem.data.frame import framed
from anomem.export.formats import Runner
from anomem.export.program import Program
from anomem.reference.retrieve import normalize_rows
from anomem.scoring import FittedDetector, Scorer
from anomem.validation import require

TOLERANCE = 1e-5
"""Largest difference of maps as a part of the largest value, of scores as a part of what `size_of_score` says."""
READ_TIE = 2e-6
"""Largest difference of two scores of prototypes that rounding may reverse, as a part of the largest of them."""
OF_TIES = 0.1
"""Largest difference of images with such a feature: another prototype of nearly the same score is read."""
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
    read_ties: int = 0
    """Images, left out above, with a feature of which rounding decides which prototype it reads last; looked for where
    images differ."""
    of_read_ties: float = 0.0
    """Largest difference of their scores and maps, in the units above."""

    @property
    def passed(self) -> bool:
        """Whether scores and maps are within `TOLERANCE` and no p-value and no verdict differs."""
        same = max(self.score, self.map) <= TOLERANCE and self.of_read_ties <= OF_TIES
        return same and self.p_values == self.verdicts == 0 and self.read_ties < max(self.images, 1)

    def sentence(self) -> str:
        """In words."""
        text = f"scores differ by {self.score:.1e}, maps by {self.map:.1e}"
        if self.p_values or self.verdicts:
            text += f", {self.p_values} p-values and {self.verdicts} verdicts differ"
        text = f"{text} ({self.images - self.read_ties} images)"
        if self.read_ties:
            text += f"; of {self.read_ties} more, rounding decides which prototype is read: by {self.of_read_ties:.1e}"
        return text


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
    of_scores = _differences(found["score"], score, size)
    of_maps = _differences(found["map"], heat, max(float(heat.abs().max()), 1e-30))
    tied = torch.zeros(len(images), dtype=torch.bool)
    if float(torch.maximum(of_scores, of_maps).max()) > TOLERANCE:
        tied = read_ties(source, own_channels(images, own), program.pixels == "uint8")
    ties = wrong_p = wrong_verdicts = 0
    if p_values is not None:
        far = (distance_to_calibration(score, program.calibration) > TOLERANCE * size) | tied
        ties, far = int((~far).sum()), far & ~tied
        wrong_p = int(((found["p_value"].double() - p_values).abs() > 1e-6)[far].sum())
        if verdicts is not None:
            wrong_verdicts = int((found["verdict"].bool() != verdicts)[far].sum())
    score_error, map_error = (float(x[~tied].max()) if not bool(tied.all()) else 0.0 for x in (of_scores, of_maps))
    of_ties = float(torch.maximum(of_scores, of_maps)[tied].max()) if bool(tied.any()) else 0.0
    return Parity(len(images), score_error, map_error, wrong_p, wrong_verdicts, ties, int(tied.sum()), of_ties)


@torch.no_grad()
def read_ties(source: FittedDetector | Scorer, images: Tensor, whole: bool) -> Tensor:
    """Images with a feature whose k-th and next largest scores of prototypes differ by rounding only: [B] bool.

    A filled memory is read through its k largest scores: which prototype is the last of them is not continuous.

    Args:
        source: of the program.
        images: [B, C, H, W] uint8 with the channels of the model.
        whole: whether the pixels stay uint8.
    """
    tied = torch.zeros(len(images), dtype=torch.bool)
    if not isinstance(source, FittedDetector) or source.scorer.top_k is None:
        return tied
    model, count = source.model, source.scorer.top_k
    images = images if whole else images.float() / 255
    queries = model.queries(model(framed(images.to(model.device), model.encoder.image_size, source.letterbox)))
    for memory, query in zip(model.memories, queries, strict=True):
        if len(memory.prototypes) <= count:
            continue
        z, keys = (normalize_rows(x.float(), memory.normalize) for x in (query, memory.prototypes))
        scores = z @ keys.mT  # [B, P, M]
        last = scores.topk(count + 1, dim=2).values[..., count - 1 :]  # [B, P, 2]
        close = last[..., 0] - last[..., 1] <= READ_TIE * scores.abs().amax()
        tied |= close.any(dim=1).cpu()
    return tied


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


def _differences(found: Tensor, expected: Tensor, size: float) -> Tensor:
    """[B], the largest of each image; NaN counts as infinite."""
    apart = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    return apart.reshape(len(apart), -1).amax(dim=1) / size
