"""Synthetic outliers: every image is damaged, reproducibly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anomem.augment import OUTLIERS, synthesize_outliers
from anomem.augment.outliers import VISIBLE
from anomem.errors import ArgumentError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(batch: int = 12, channels: int = 1, height: int = 16, width: int = 16) -> Tensor:
    """Bright discs on black, so that many rectangles hold nothing but background: [B, C, H, W]."""
    y, x = torch.arange(height)[:, None] - height / 2, torch.arange(width)[None, :] - width / 2
    radius = torch.linspace(2, 5, batch).view(-1, 1, 1)
    return ((y.square() + x.square()).sqrt() < radius).float()[:, None].expand(-1, channels, -1, -1).contiguous()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kinds", [None, *((name,) for name in OUTLIERS)], ids=str)
def test_every_image_is_damaged(kinds: tuple[str, ...] | None, channels: int) -> None:
    images = blobs(channels=channels, width=20)
    for seed in range(5):
        outliers = synthesize_outliers(images, seeded(seed), kinds)
        assert outliers.shape == images.shape
        assert outliers.dtype == torch.float32
        assert 0 <= float(outliers.min()) <= float(outliers.max()) <= 1
        assert float((outliers - images).abs().amax((1, 2, 3)).min()) >= VISIBLE


def test_flat_images_are_damaged_too() -> None:
    for value in (0.0, 0.5, 1.0):
        images = torch.full((10, 1, 16, 16), value)
        changed = (synthesize_outliers(images, seeded()) - images).abs().amax((1, 2, 3))
        assert float(changed.min()) >= VISIBLE


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch(batch: int) -> None:
    assert synthesize_outliers(blobs(batch), seeded()).isfinite().all()


def test_reproducible_and_inputs_kept() -> None:
    images = blobs()
    before = images.clone()
    assert torch.equal(synthesize_outliers(images, seeded(1)), synthesize_outliers(images, seeded(1)))
    assert not torch.equal(synthesize_outliers(images, seeded(1)), synthesize_outliers(images, seeded(2)))
    assert torch.equal(images, before)


def test_pieces_come_from_the_image() -> None:
    """Cut-paste moves pixels and makes none."""
    images = torch.arange(256.0).view(1, 1, 16, 16).div(255).repeat(4, 1, 1, 1)
    pasted = synthesize_outliers(images, seeded(), ("cut_paste",))
    assert set(pasted.flatten().tolist()) <= set(images.flatten().tolist())


def test_unknown_kind() -> None:
    with pytest.raises(ArgumentError, match=r"`kinds`: expected one of 'cut_paste', .*received 'hole'"):
        synthesize_outliers(blobs(), seeded(), ("hole",))
    with pytest.raises(ArgumentError, match="`kinds`: expected at least one"):
        synthesize_outliers(blobs(), seeded(), ())


def test_a_name_alone_is_not_read_letter_by_letter() -> None:
    with pytest.raises(ArgumentError, match="`kinds`: expected a sequence, received 'erase'"):
        synthesize_outliers(blobs(), seeded(), "erase")
