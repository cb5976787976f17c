"""Any torchvision-style data set becomes a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData

from anomem.data import DataConfig, StreamedImages, load_task, read_image, task_from_dataset
from anomem.data.convert import as_uint8
from anomem.errors import ArgumentError, UserError


def pairs(count: int = 40, classes: int = 4) -> list[tuple[Tensor, int]]:
    return [(torch.full((1, 8, 8), i / count), i % classes) for i in range(count)]


CONFIG = DataConfig("mine", normal="1")


def test_split_of_one_dataset() -> None:
    task = task_from_dataset(pairs(), config=CONFIG)
    assert task.name == "mine 1"
    assert (len(task.train), len(task.test)) == (7, 12)
    assert int(task.test_is_anomaly.sum()) == 9
    exposed = task_from_dataset(pairs(), config=DataConfig("mine", normal="1", outlier_ratio=0.3))
    assert (~exposed.train_is_normal).sum() == 2


def test_own_test_set_and_class_names() -> None:
    task = task_from_dataset(pairs(), pairs(8), config=DataConfig("mine", normal="b"), classes=("a", "b", "c", "d"))
    assert (len(task.train), len(task.test)) == (10, 8)
    assert task.test_kinds == ("a", "b", "c", "d") * 2


def test_torchvision_dataset_of_pil_images() -> None:
    fake = FakeData(30, (3, 12, 10), num_classes=3)
    task = task_from_dataset(fake, config=DataConfig("fake", normal="0", image_size=16), aligned=False)
    assert (task.train.channels, task.train.size, task.aligned) == (3, (16, 16), False)


def test_streamed() -> None:
    config = DataConfig("mine", normal="1", resident_megabytes=0, workers=0)
    streamed, resident = (task_from_dataset(pairs(), config=c) for c in (config, CONFIG))
    assert isinstance(streamed.train, StreamedImages)
    order = torch.tensor([3, 0])
    assert torch.equal(next(streamed.train.batches(order, 2))[0], next(resident.train.batches(order, 2))[0])


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((4, 6), 51, np.uint8)),
        np.full((4, 6), 51, np.uint8),
        np.full((4, 6, 1), 0.2, np.float32),
        torch.full((4, 6), 0.2),
        torch.full((1, 4, 6), 51, dtype=torch.uint8),
        np.full((4, 6), 51 * 257 + 100, np.uint16),
        np.full((4, 6), 51 * 257, ">u2"),
        Image.fromarray(np.full((4, 6), 51 * 257 - 100, np.uint16)),
    ],
    ids=[
        "PIL",
        "uint8 array",
        "float array",
        "float tensor",
        "uint8 tensor",
        "uint16 array",
        "big-endian",
        "16-bit PIL",
    ],
)
def test_anything_becomes_uint8(image: Any) -> None:
    assert torch.equal(as_uint8(image), torch.full((1, 4, 6), 51, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.tensor([[0.5, float("nan")]]), "expected finite pixels, received NaN or infinity; repair or remove"),
        (torch.tensor([[0.5, 2.0]]), "expected floating pixels from 0 to 1, received 0.5 to 2"),
        (torch.zeros(2, 2, 2, 2), r"expected an image \[C, H, W\] or \[H, W\], received shape \[2, 2, 2, 2\]"),
        (torch.zeros(2, 2, dtype=torch.int32), "expected uint8, uint16 or floating pixels, received torch.int32"),
        ("cat.png", "expected a PIL image, an array or a tensor of pixels, received str"),
    ],
)
def test_what_does_not(image: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        as_uint8(image)


def test_nan_in_the_data_names_the_image() -> None:
    data = pairs()
    data[5] = (torch.full((1, 8, 8), float("nan")), 1)
    with pytest.raises(UserError, match=r"`dataset\[5\]`: expected finite pixels, received NaN"):
        task_from_dataset(data, config=CONFIG)


def test_too_few_and_one_class() -> None:
    with pytest.raises(UserError, match="`train`: expected at least two images, received 1"):
        task_from_dataset(pairs(1), config=CONFIG)
    with pytest.raises(UserError, match="found 3 of one class only"):
        task_from_dataset(pairs(10, 1), pairs(3, 1), config=DataConfig("mine"))
    with pytest.raises(UserError, match="`classes`: expected a name for each label up to 3, received 2"):
        task_from_dataset(pairs(), config=CONFIG, classes=("a", "b"))


def test_one_class_is_all_trained_on() -> None:
    task = task_from_dataset(pairs(10, 1), config=DataConfig("mine"))
    assert (len(task.train), len(task.test), bool(task.train_is_normal.all())) == (10, 0, True)


def test_items_without_a_label_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"`dataset\[0\]`: expected a pair \(image, label\), received Tensor"):
        task_from_dataset([image for image, _ in pairs()], config=CONFIG)


@pytest.mark.parametrize("size", [0, -3])
def test_a_side_no_image_has(size: int) -> None:
    with pytest.raises(ArgumentError, match=f"`data.image_size`: expected an integer ≥ 1, received {size}"):
        task_from_dataset(pairs(), config=DataConfig("mine", normal="1", image_size=size))
    with pytest.raises(ArgumentError, match=f"`data.image_size`: expected an integer ≥ 1, received {size}"):
        load_task(DataConfig("digits", image_size=size))


COLOURS = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P", "LA", "L", "1", "YCbCr"])
def test_pil_images_are_treated_as_files_are(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    pixels = as_uint8(image)
    assert len(pixels) == (1 if mode in ("LA", "L", "1") else 3)
    if mode in ("CMYK", "YCbCr"):
        assert torch.equal(pixels, as_uint8(image.convert("RGB")))
        return
    image.save(tmp_path / "image.png")
    assert torch.equal(pixels, read_image(tmp_path / "image.png", grey=len(pixels) == 1))


def test_pil_images_are_turned_upright(tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.fromarray(COLOURS).save(tmp_path / "image.png", exif=orientation)
    with Image.open(tmp_path / "image.png") as image:
        assert torch.equal(as_uint8(image), read_image(tmp_path / "image.png"))
        assert as_uint8(image).shape == (3, 8, 6)


def test_levels_of_arrays() -> None:
    config = DataConfig("mine", normal="1", levels=(100, 300))
    task = task_from_dataset([(np.full((4, 4), v, np.int16), v % 2) for v in range(100, 300)], config=config)
    order = torch.arange(len(task.train))
    pixels = next(task.train.batches(order, len(order)))[0]
    assert int(pixels.max()) - int(pixels.min()) > 200


def test_a_loader_is_no_data_set() -> None:
    loader = DataLoader(pairs(), batch_size=4)
    with pytest.raises(ArgumentError, match=r"`train`: expected a data set .*received DataLoader; .*loader\.dataset"):
        task_from_dataset(loader, config=CONFIG)
    with pytest.raises(ArgumentError, match=r"`test`: expected a data set .*received DataLoader"):
        task_from_dataset(pairs(), loader, config=CONFIG)
