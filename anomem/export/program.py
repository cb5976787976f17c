"""Program: a run's decision as one module of plain operators, from pixels to score, p-value, verdict and map."""

from __future__ import annotations

import copy
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomem.data.convert import GREY, grey_of
from anomem.models import AnoMem
from anomem.scoring import FittedDetector, Scorer
from anomem.scoring.decision import normals_needed
from anomem.validation import require, require_choice

Pixels = Literal["uint8", "float32"]


class Program(nn.Module):
    """Images of any size -> score, p-value, verdict and map, with everything inside that lies between.

    Resizing (bilinear, antialiased; whole grey levels of uint8 pixels), grey or colour, normalisation, encoder,
    memories, scores, calibration and threshold. The operators are plain PyTorch ones.

    Args:
        source: a fitted detector or the scorer of a trained run; it is copied.
        by: the score that is given out; the leading one when None.
        alpha: false-alarm rate of the verdict; that of the fit when None. Only of a fitted detector.
        pixels: dtype of the images: "uint8", or "float32" in [0, 1].
        channels: of the images, 1 or 3; those of the model when None.
        letterbox: whether images keep their aspect ratio; the detector's own setting when None.
        portable: resize by products with matrices, which every runtime computes alike, instead of by torch's operator.

    Shape:
        [B, channels, H, W] -> score [B], then p-value [B] and verdict [B] bool where `names` has them, map [B, H, W].

    Raises:
        ArgumentError: an unknown score, an alpha without a calibration or one that it cannot promise, or channels that
            the model cannot read.

    Example:
        >>> program = Program(load_detector("runs/mine"))
        >>> program.names
        ('score', 'p_value', 'verdict', 'map')
        >>> score, p_value, verdict, heat = program(images)  # [B], [B], [B] bool, [B, H, W]
    """

    calibration: Tensor
    source: FittedDetector | Scorer

    def __init__(
        self,
        source: FittedDetector | Scorer,
        *,
        by: str | None = None,
        alpha: float | None = None,
        pixels: Pixels = "uint8",
        channels: int | None = None,
        letterbox: bool | None = None,
        portable: bool = True,
    ) -> None:
        super().__init__()
        require_choice(pixels, "pixels", get_args(Pixels))
        fitted = isinstance(source, FittedDetector)
        if isinstance(source, FittedDetector):
            lead = source.lead
        else:
            lead = "detector" if source.head is None else "stage2"
        self.by: str = by or lead
        require_choice(self.by, "by", source.names)
        require(fitted or alpha is None, "alpha", "none: a trained run is not calibrated", alpha)
        own = source.model.mean.shape[0]
        right = channels in (None, own) or {channels, own} == {1, 3}
        require(right, "channels", "1 or 3" if own in (1, 3) else str(own), channels)
        self.letterbox = getattr(source, "letterbox", False) if letterbox is None else letterbox
        self.pixels, self.channels, self.portable = pixels, channels or own, portable
        self.source = copy.deepcopy(source).cpu().eval()
        for memory in self.source.model.memories:
            memory.impl = "reference"
        self.map_name = "plain" if self.by == "plain" else "local" if fitted else "detector"
        self.alpha: float | None = None
        self.allowed = 0
        names = ["score", "map"]
        if isinstance(source, FittedDetector):
            self.alpha = source.alpha if alpha is None else alpha
            names.insert(1, "p_value")
            if alpha is not None or source.calibration.count >= normals_needed(source.alpha):
                source.calibration.check(self.alpha)
                names.insert(2, "verdict")
            scores = source.calibration.scores[self.by]  # float32 numbers, held as float64
            self.register_buffer("calibration", scores.float())
            # p ≤ alpha as a number of calibration normals, so that no rounding decides.
            self.allowed = math.floor(self.alpha * (1 + 1e-12) * (len(scores) + 1))
        self.names = tuple(names)

    @property
    def model(self) -> AnoMem:
        """Encoder and memories."""
        return self.source.model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        size = (images.shape[2], images.shape[3])
        scores, heat = self._scored(self._prepared(images), self.model.encoder.image_size if self.letterbox else size)
        found = {"score": scores, "map": unframed(heat, size) if self.letterbox else heat}
        if "p_value" in self.names:
            # 1 + the number of calibration normals that score at least as high.
            higher = 1 + (self.calibration[None] >= scores[:, None]).int().sum(dim=1, dtype=torch.int32)
            found["p_value"] = higher.float() / (len(self.calibration) + 1)
            found["verdict"] = higher <= self.allowed
        return tuple(found[name] for name in self.names)

    def _prepared(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] as given -> [B, C, h, w] in [0, 1], of the model's channels and size."""
        own = self.model.mean.shape[0]
        whole = self.pixels == "uint8"
        if self.channels == 3 and own == 1:
            if whole:
                images = grey_of(images)
            else:
                red, green, blue = (w / 65536 * images[:, i : i + 1] for i, w in enumerate(GREY))
                images = red + green + blue
        frame = self.model.encoder.image_size
        if self.letterbox:
            resized = framed(images.float(), frame)
        else:
            resized = resized_to(images.float(), frame, self.portable)
        if whole:
            resized = resized.round().clamp(0, 255) / 255
        return resized.expand(-1, own, -1, -1) if self.channels == 1 and own == 3 else resized

    def _scored(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Scores [B] float32 and map [B, H, W]."""
        if isinstance(self.source, FittedDetector):
            queries = self.model.queries(self.model(images))
            found = self.source.scorer.of_queries(queries, size, pooled=self.source.labels is not None)
            return self.source.scores_of(found)[self.by].float(), found.maps[self.map_name]
        scored = self.source.unchecked(images)
        heat = scored.maps[self.map_name]
        return scored.scores[self.by], F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def resized_to(images: Tensor, size: tuple[int, int], portable: bool) -> Tensor:
    """Images [B, C, H, W] float brought to a size, bilinear with antialiasing; of that size already they are the same.

    Args:
        images: any size.
        size: (h, w).
        portable: by two products with matrices.
    """
    if not portable:
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    rows, columns = (weights(images.shape[2 + i], size[i]) for i in range(2))
    return rows @ (images @ columns.mT)


def framed(images: Tensor, frame: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] float letterboxed into a frame, as `anomem.data.frame.framed` does."""
    lengths = box(images, frame)
    rows, columns = (weights(images.shape[2 + i], frame[i], lengths[i]) for i in range(2))
    return rows @ (images @ columns.mT)


def unframed(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, H', W'] of a frame at the size (H, W) of the images that were letterboxed into it."""
    frame = (maps.shape[1], maps.shape[2])
    lengths = box(maps.new_zeros(1, 1, *size), frame)
    matrices = []
    for count, length, target in zip(size, lengths, frame, strict=True):
        position = torch.arange(count, dtype=torch.float32)
        place = (position + 0.5) * length / torch.ones_like(position).sum() - 0.5
        centre = torch.minimum(place.clamp_min(0), length - 1) + ((target - length) / 2).floor()
        matrices.append((1 - (torch.arange(target, dtype=torch.float32)[None] - centre[:, None]).abs()).clamp_min(0))
    return matrices[0] @ (maps @ matrices[1].mT)


def box(images: Tensor, frame: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Height and width, 0-dim, of letterboxed images [B, C, H, W] in their frame; see `anomem.data.frame.box_of`."""
    height, width = (torch.ones(images.shape[2 + i], dtype=torch.float64).sum() for i in range(2))
    scale = torch.minimum(frame[0] / height, frame[1] / width)
    found = [(n * scale).round().clamp(1, f).float() for n, f in zip((height, width), frame, strict=True)]
    return found[0], found[1]


def weights(source: int, target: int, length: Tensor | None = None) -> Tensor:
    """[target, source], the triangular filter of antialiased bilinear resizing; rows add up to 1.

    Args:
        source: pixels of the given image along one axis; symbolic while it is exported.
        target: pixels wanted.
        length: 0-dim, of the image among them, in the middle, with its border pixels repeated; all of them when None.
    """
    position = torch.arange(source, dtype=torch.float32)[None] + 0.5
    place = torch.arange(target, dtype=torch.float32)[:, None]
    if length is not None:
        place = torch.minimum((place - ((target - length) / 2).floor()).clamp_min(0), length - 1)
    scale = torch.ones_like(position).sum() / (target if length is None else length)
    centre = (place + 0.5) * scale
    triangle = (1 - ((position - centre) / scale.clamp_min(1)).abs()).clamp_min(0)
    return triangle / triangle.sum(dim=1, keepdim=True)


def example(program: Program, batch: int = 2) -> Tensor:
    """Images [B, channels, H, W] of the program's dtype, to trace it with: larger than the model's, not square."""
    height, width = program.model.encoder.image_size
    images = torch.rand(batch, program.channels, height + 5, width + 9, generator=torch.Generator().manual_seed(0))
    return (images * 255).round().to(torch.uint8) if program.pixels == "uint8" else images


def traced(program: Program) -> torch.export.ExportedProgram:
    """The program as a graph of ATen operators, for any batch, height and width."""
    anything = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(
            program, (example(program),), dynamic_shapes=({0: anything, 2: anything, 3: anything},)
        )
