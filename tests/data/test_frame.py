"""Images in a frame: stretched, or letterboxed, and maps brought back to the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomem.data import DataConfig, ImageFiles, load_task
from anomem.data.frame import box_of, framed, unframed
from anomem.errors import ArgumentError


@pytest.mark.parametrize("image", [(40, 100), (100, 40), (64, 64), (3, 200)])
def test_letterbox_keeps_the_aspect_ratio(image: tuple[int, int]) -> None:
    top, left, height, width = box_of(image, (64, 96))
    assert top + height <= 64
    assert left + width <= 96
    assert height == 64 or width == 96
    assert abs(height / width - image[0] / image[1]) <= 1 / min(height, width) * max(1, image[0] / image[1])


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_a_square_stays_square(kind: torch.dtype) -> None:
    images = torch.zeros(1, 3, 60, 120)
    images[:, :, 20:40, 50:70] = 1
    images = (images * 255).to(kind) if kind == torch.uint8 else images
    boxed, stretched = framed(images, (64, 64), True), framed(images, (64, 64), False)
    assert boxed.shape == stretched.shape == (1, 3, 64, 64)
    assert boxed.dtype == kind

    def sides(found: torch.Tensor) -> tuple[int, int]:
        bright = found[0, 0].float() > found.float().max() / 2
        return int(bright.any(1).sum()), int(bright.any(0).sum())

    height, width = sides(boxed)
    assert abs(height - width) <= 1
    height, width = sides(stretched)
    assert height > 1.5 * width


def test_maps_come_back_to_the_image() -> None:
    images = torch.zeros(1, 1, 50, 100)
    images[:, :, 30:40, 70:90] = 1
    for letterbox in (False, True):
        back = unframed(framed(images, (100, 100), letterbox)[:, 0], (50, 100), letterbox)
        assert back.shape == (1, 50, 100)
        assert float((back - images[:, 0]).abs().mean()) < 0.02
    # taking the frame for the image would shift them
    assert (
        float((unframed(framed(images, (100, 100), True)[:, 0], (50, 100), False) - images[:, 0]).abs().mean()) > 0.03
    )


def test_rectangles_from_a_folder_with_masks(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[::2] = 200
    for place in ("train/good/0", "train/good/1", "test/good/0", "test/spot/0"):
        file = tmp_path / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + int(place[-1])).save(file)
    mask = np.zeros((40, 80), np.uint8)
    mask[10:30, 60:80] = 255
    (tmp_path / "ground_truth" / "spot").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "ground_truth" / "spot" / "0.png")
    for letterbox, right in ((True, slice(49, 64)), (False, slice(48, 64))):
        config = DataConfig("folder", root=str(tmp_path), normal="", image_size=(48, 64), letterbox=letterbox)
        task = load_task(config)
        assert task.train.size == (48, 64)
        assert task.test_masks is not None
        marked = task.test_masks[-1]
        assert bool(marked[:, right].any())
        assert not bool(marked[:, :47].any())
        # letterboxed, the image is 32 rows of 48
        rows = marked.any(1).nonzero().flatten()
        assert (int(rows.min()), int(rows.max())) == ((16, 31) if letterbox else (12, 35))
    assert ImageFiles([tmp_path / "train" / "good" / "0.png"], (24, 64), letterbox=True)[0].shape == (3, 24, 64)


@pytest.mark.parametrize("size", [(64,), (64, 64, 64), (0, 64), (64, 100000)])
def test_wrong_sizes_are_named(size: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"data\.image_size"):
        DataConfig("folder", image_size=size)  # type: ignore[arg-type]
