"""Large images in tiles: the joined maps are those of the whole image, without seams, a few tiles at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from anomem.errors import ArgumentError
from anomem.models import NetworkEncoder, TiledEncoder, tiled
from anomem.models.encoders import Encoder


class Patches(nn.Module):
    """Two scales of strides 4 and 8 that see nothing beyond their own patch; notes how many tiles came at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(3, 5, 4, 4), nn.Conv2d(3, 7, 8, 8)
        self.most = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.most = max(self.most, images.shape[0] * images.shape[2] * images.shape[3])
        return [self.fine(images), self.coarse(images)]


class Wide(nn.Module):
    """A scale of stride 8 that sees 24 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.around = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.around(self.patch(images))]


def encoder(network: nn.Module, size: tuple[int, int]) -> Encoder:
    return NetworkEncoder(network, size, freeze=True)


@pytest.mark.parametrize("overlap", [0, 8, 16, None])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (32, 200), (72, 88)])
def test_tiles_give_the_whole_images_maps(size: tuple[int, int], overlap: int | None) -> None:
    network = Patches()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    whole, joined = network(images), TiledEncoder(encoder(network, (32, 32)), size, overlap)
    assert joined.sizes == tuple(tuple(m.shape[2:]) for m in whole)
    for found, expected in zip(joined(images), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_sides_that_are_no_multiple_of_the_stride() -> None:
    joined = TiledEncoder(encoder(Patches(), (32, 32)), (45, 70))
    maps = joined(torch.rand(1, 3, 45, 70))
    assert [tuple(m.shape[2:]) for m in maps] == [(12, 18), (6, 9)] == list(joined.sizes)
    assert all(bool(m.isfinite().all()) for m in maps)


def test_overlap_hides_the_seams() -> None:
    """What a tile's border does not see comes from the tile beside it."""
    network = Wide()
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = network(images)[0]

    def error(overlap: int) -> float:
        found = TiledEncoder(encoder(network, (64, 64)), (128, 128), overlap)(images)[0]
        return float((found - expected).detach().abs().max())

    assert error(32) < 0.7 * error(0)


def test_memory_is_bounded_by_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "PIXELS", 4 * 32 * 32)
    network = Patches()
    joined = TiledEncoder(encoder(network, (32, 32)), (256, 256))
    network.most = 0
    joined(torch.rand(2, 3, 256, 256))
    assert network.most <= 4 * 32 * 32


@pytest.mark.parametrize(
    ("tile", "size", "overlap", "message"),
    [
        ((32, 32), (24, 64), None, "tile.*at most 24"),
        ((36, 36), (64, 64), None, "tile.*a side that the strides"),
        ((32, 40), (64, 64), None, "square tiles"),
        ((32, 32), (64, 64), 32, "overlap"),
    ],
)
def test_wrong_tiles_are_named(tile: tuple[int, int], size: tuple[int, int], overlap: int | None, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TiledEncoder(encoder(Patches(), tile), size, overlap)
