"""TiledEncoder: large images in overlapping tiles, so that memory is bounded by the tile and not by the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomem.models.encoders import Encoder
from anomem.validation import require, require_size

PIXELS = 1 << 20
"""Of the tiles that pass the encoder at once."""


class TiledEncoder(Encoder):
    """Cuts images into overlapping tiles, encodes them a few at a time, and joins their maps.

    Where tiles overlap their features are averaged with weights that fall linearly towards the tile's border, so that
    no seam is left. Memory beyond the images and their maps is that of `PIXELS` pixels in the encoder, whatever the
    images' size.

    Args:
        encoder: for square tiles; its image size is the tile.
        image_size: (H, W) of the images, at least a tile each.
        overlap: of neighbouring tiles, in pixels; at least that, a quarter of the tile when None.

    Shape:
        [B, C, H, W] -> S maps [B, C_s, ceil(H / stride_s), ceil(W / stride_s)].

    Raises:
        ArgumentError: images smaller than a tile, or a tile that a scale's stride does not divide.

    Example:
        >>> tile = pretrained_encoder("efficientnet_lite0", (256, 256), channels=3)
        >>> encoder = TiledEncoder(tile, image_size=(1500, 2000))
        >>> encoder.sizes
        ((188, 250), (94, 125), (47, 63))
    """

    def __init__(self, encoder: Encoder, image_size: tuple[int, int], overlap: int | None = None) -> None:
        super().__init__()
        require_size(image_size, "image_size")
        tile = encoder.image_size[0]
        require(encoder.image_size == (tile, tile), "encoder", "one for square tiles", encoder.image_size)
        large = min(image_size) >= tile
        require(large, "tile", lambda: f"at most {min(image_size)}, the images' smaller side", tile)
        self.strides = tuple(tile // side for side, _ in encoder.sizes)
        even = all(side * stride == tile for (side, _), stride in zip(encoder.sizes, self.strides, strict=True))
        unit = max(self.strides)
        nested = all(unit % stride == 0 for stride in self.strides)
        require(even and nested, "tile", "a side that the strides of the encoder's maps divide, as powers of 2", tile)
        overlap = tile // 4 if overlap is None else overlap
        require(0 <= overlap < tile, "overlap", f"pixels from 0 to {tile - 1}", overlap)
        self.encoder, self.tile, self.image_size = encoder, tile, image_size
        self.tops, self.lefts = (_origins(side, tile, overlap, unit) for side in image_size)
        self.names, self.channels = encoder.names, encoder.channels
        self.sizes = tuple((-(-image_size[0] // s), -(-image_size[1] // s)) for s in self.strides)
        self.ramp = max(unit, overlap)

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Those of the tiles' encoder."""
        return self.encoder.parts

    @property
    def share(self) -> float:
        """Of an image's area, a tile's."""
        return self.tile**2 / (self.image_size[0] * self.image_size[1])

    def _tiles(self, images: Tensor) -> Iterator[tuple[list[tuple[int, int, int]], Tensor]]:
        """Some tiles [k, C, tile, tile] with image, top and left of each."""
        places = [(b, y, x) for b in range(len(images)) for y in self.tops for x in self.lefts]
        at_once = max(1, PIXELS // self.tile**2)
        for begin in range(0, len(places), at_once):
            part = places[begin : begin + at_once]
            yield part, torch.stack([images[b, :, y : y + self.tile, x : x + self.tile] for b, y, x in part])

    def forward(self, images: Tensor) -> list[Tensor]:
        """The joined maps."""
        height, width = self.tops[-1] + self.tile, self.lefts[-1] + self.tile
        around = (0, width - images.shape[3], 0, height - images.shape[2])
        padded = F.pad(images, around, mode="replicate") if any(around) else images
        weights = [self._weights(stride, images.device) for stride in self.strides]
        sums = [
            torch.zeros(len(images), c, height // s, width // s, dtype=images.dtype, device=images.device)
            for c, s in zip(self.channels, self.strides, strict=True)
        ]
        for places, tiles in self._tiles(padded):
            for total, found, weight, stride in zip(sums, self.encoder(tiles), weights, self.strides, strict=True):
                side, weighted = self.tile // stride, found * weight
                for (b, y, x), of_tile in zip(places, weighted, strict=True):
                    top, left = y // stride, x // stride
                    total[b, :, top : top + side, left : left + side] += of_tile
        return [
            (total / self._total(weight, stride))[:, :, :h, :w]
            for total, weight, stride, (h, w) in zip(sums, weights, self.strides, self.sizes, strict=True)
        ]

    def _weights(self, stride: int, device: torch.device) -> Tensor:
        """[t, t] in (0, 1], 1 inside and falling over the overlap."""
        side, ramp = self.tile // stride, max(1, self.ramp // stride)
        place = torch.arange(1, side + 1, device=device)
        line = torch.minimum(place, side + 1 - place).clamp_max(ramp) / ramp
        return line[:, None] * line

    def _total(self, weight: Tensor, stride: int) -> Tensor:
        """Sum of the weights at every position of the joined map."""
        side = self.tile // stride
        total = weight.new_zeros((self.tops[-1] + self.tile) // stride, (self.lefts[-1] + self.tile) // stride)
        for y in self.tops:
            for x in self.lefts:
                total[y // stride : y // stride + side, x // stride : x // stride + side] += weight
        return total


def _origins(length: int, tile: int, overlap: int, unit: int) -> list[int]:
    """Where tiles begin along a side: evenly spread multiples of a unit, the last one at or beyond the end."""
    last = -(-(length - tile) // unit) * unit
    steps = -(-last // max(unit, tile - overlap))
    return [round(i * last / steps / unit) * unit for i in range(steps + 1)] if steps else [0]
