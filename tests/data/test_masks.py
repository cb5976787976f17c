"""Masks as people have them: read as they are meant, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from anomem.data import DataConfig, load_task
from anomem.data.convert import read_mask, resize_masks
from anomem.errors import UserError

Truth = NDArray[np.bool_]


@pytest.fixture
def truth() -> Truth:
    """A small defect: [20, 30] bool."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:14] = True
    return mask


def save(path: Path, image: Image.Image | NDArray[np.generic]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return path


def alpha(truth: Truth, mode: str, colour: int, outside: int) -> Image.Image:
    """The mask in the transparency, over one colour inside and another outside."""
    grey = np.where(truth, colour, outside).astype(np.uint8)
    bands = [Image.fromarray(grey)] * (len(mode) - 1)
    return Image.merge(mode, [*bands, Image.fromarray(truth.astype(np.uint8) * 255)])


def palette(truth: Truth, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(truth.astype(np.uint8), mode="L").convert("P")
    image.putdata([int(v) for v in truth.ravel()])
    image.putpalette([v for colour in colours for v in colour])
    return image


def noisy(truth: Truth) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 11, truth.shape)
    return np.where(truth, 255 - noise, noise).astype(np.uint8)


def red(truth: Truth) -> NDArray[np.uint8]:
    return np.stack([truth * 255, truth * 0, truth * 0], -1).astype(np.uint8)


MEANT: dict[str, Callable[[Truth], Image.Image | NDArray[np.generic]]] = {
    "white": lambda m: m.astype(np.uint8) * 255,
    "half grey": lambda m: m.astype(np.uint8) * 128,
    "bilevel": lambda m: Image.fromarray(m),
    "noise around": noisy,
    "labels": lambda m: m.astype(np.uint8) * 3,
    "16-bit labels": lambda m: m.astype(np.uint16),
    "16 bits": lambda m: m.astype(np.uint16) * 65535,
    "12 bits in 16": lambda m: m.astype(np.uint16) * 4095,
    "8 bits in 16": lambda m: m.astype(np.uint16) * 255,
    "red": red,
    "white on transparent white": lambda m: alpha(m, "RGBA", 255, 255),
    "white on transparent black": lambda m: alpha(m, "RGBA", 255, 0),
    "black on transparent white": lambda m: alpha(m, "RGBA", 0, 255),
    "grey with transparency": lambda m: alpha(m, "LA", 255, 255),
    "opaque RGBA": lambda m: Image.fromarray(m.astype(np.uint8) * 255).convert("RGBA"),
    "dark palette": lambda m: palette(m, (0, 0, 0), (30, 0, 0)),
    "reversed palette": lambda m: palette(m, (255, 255, 255), (0, 0, 0)),
    "coloured palette": lambda m: palette(m, (255, 255, 0), (0, 255, 255)),
    "palette of greys": lambda m: Image.fromarray(noisy(m)).convert("P"),
}


@pytest.mark.parametrize("form", MEANT)
def test_masks_are_read_as_they_are_meant(tmp_path: Path, truth: Truth, form: str) -> None:
    path = save(tmp_path / "mask.png", MEANT[form](truth))
    assert np.array_equal(read_mask(path).numpy(), truth)


def test_a_float_mask(tmp_path: Path, truth: Truth) -> None:
    soft = np.where(truth, 0.9, 0.2).astype(np.float32)
    assert np.array_equal(read_mask(save(tmp_path / "mask.tiff", soft)).numpy(), truth)


def half_bright(truth: Truth) -> Image.Image:
    """Opaque pixels of two colours."""
    colour = np.zeros(truth.shape, np.uint8)
    colour[:, 12:] = 255
    return Image.merge("LA", [Image.fromarray(colour), alpha(truth, "LA", 0, 0).getchannel(1)])


@pytest.mark.parametrize(
    ("form", "words"),
    [(lambda m: palette(~m, (255, 255, 255), (0, 0, 0)), "palette"), (half_bright, "transparency")],
    ids=["inverted palette", "colour and transparency"],
)
def test_masks_with_two_meanings_are_refused(
    tmp_path: Path, truth: Truth, form: Callable[[Truth], Image.Image], words: str
) -> None:
    path = save(tmp_path / "mask.png", form(truth))
    message = rf"mask\.png: expected a mask of black and white, but .*{words}.*save it in grey"
    with pytest.raises(UserError, match=message):
        read_mask(path)


@pytest.mark.parametrize("side", [128, 100, 37])
def test_thin_defects_remain(side: int) -> None:
    masks = torch.zeros(4, 512, 512, dtype=torch.bool)
    masks[0, 101] = True
    masks[1, :, 203] = True
    masks[2, 77, 333] = True
    small = resize_masks(masks, side)
    assert small.flatten(1).any(1).tolist() == [True, True, True, False]
    assert bool(small[0].any(0).all()), "a line is still a line"
    assert bool(small[1].any(1).all())
    assert int(small[2].sum()) <= 4


def test_larger_masks_are_exact() -> None:
    mask = torch.tensor([[True, False], [False, False]])[None]
    expected = torch.zeros(1, 6, 6, dtype=torch.bool)
    expected[0, :3, :3] = True
    assert torch.equal(resize_masks(mask, 6), expected)


# In a folder.


@pytest.fixture
def root(tmp_path: Path, truth: Truth) -> Path:
    source = np.random.default_rng(0)
    for part, count in (("train/good", 3), ("test/good", 2), ("test/cut", 2)):
        for i in range(count):
            save(tmp_path / part / f"{i}.png", source.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    for i in range(2):
        save(tmp_path / "ground_truth" / "cut" / f"{i}.png", truth.astype(np.uint8) * 255)
    return tmp_path


def config(root: Path, **changed: object) -> DataConfig:
    return replace(DataConfig("folder", root=str(root), image_size=16), **changed)


def masks_of(root: Path) -> Tensor:
    masks = load_task(config(root)).test_masks
    assert masks is not None
    return masks


@pytest.mark.parametrize("suffix", ["PNG", "bmp", "tif", "TIFF", "pgm"])
@pytest.mark.parametrize("ending", ["", "_mask"])
def test_every_lossless_format(root: Path, truth: Truth, suffix: str, ending: str) -> None:
    expected = masks_of(root)
    (root / "ground_truth" / "cut" / "1.png").unlink()
    save(root / "ground_truth" / "cut" / f"1{ending}.{suffix}", truth.astype(np.uint8) * 255)
    assert torch.equal(masks_of(root), expected)


def test_a_jpeg_mask_is_refused(root: Path, truth: Truth) -> None:
    (root / "ground_truth" / "cut" / "1.png").unlink()
    save(root / "ground_truth" / "cut" / "1.jpg", truth.astype(np.uint8) * 255)
    with pytest.raises(UserError, match=r"1\.jpg: a JPEG mask is blurred at its edges; save it as 1\.png"):
        load_task(config(root))


def test_two_masks_of_one_image(root: Path, truth: Truth) -> None:
    save(root / "ground_truth" / "cut" / "1_mask.png", truth.astype(np.uint8) * 255)
    with pytest.raises(UserError, match=r"expected one mask of 1\.png, found 1\.png and 1_mask\.png"):
        load_task(config(root))


def test_two_images_of_one_mask(root: Path) -> None:
    save(root / "test" / "cut" / "1.bmp", np.zeros((20, 30), np.uint8))
    with pytest.raises(UserError, match=r"1\.bmp: expected images of different names, found 2 called 1"):
        load_task(config(root))


@pytest.mark.parametrize(("size", "right"), [((40, 60), True), ((10, 15), True), ((20, 20), False), ((30, 20), False)])
def test_another_aspect_is_refused(root: Path, size: tuple[int, int], right: bool) -> None:
    save(root / "ground_truth" / "cut" / "1.png", np.full(size, 255, np.uint8) * np.eye(*size, dtype=np.uint8))
    if right:
        assert bool(masks_of(root)[1].any())
        return
    with pytest.raises(UserError, match=rf"1\.png: expected a mask of .* 30 × 20 .*received {size[1]} × {size[0]}"):
        load_task(config(root))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_masks_are_drawn_on_the_upright_photograph(root: Path, truth: Truth, suffix: str) -> None:
    (root / "test" / "cut" / "1.png").unlink()
    orientation = Image.Exif()
    orientation[0x0112] = 6  # stored on its side
    stored = Image.fromarray(np.zeros((30, 20, 3), np.uint8))
    stored.save(root / "test" / "cut" / f"1.{suffix}", exif=orientation)
    assert bool(masks_of(root)[1].any())
    save(root / "ground_truth" / "cut" / "1.png", truth.T.astype(np.uint8) * 255)
    with pytest.raises(UserError, match=r"1\.png: expected a mask of .* 30 × 20 when upright .*received 20 × 30"):
        load_task(config(root))


@pytest.mark.parametrize("value", [0, 255])
def test_masks_of_nothing_and_of_everything(root: Path, value: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(config(root))
    save(root / "ground_truth" / "cut" / "1.png", np.full((20, 30), value, np.uint8))
    with pytest.warns(UserWarning, match=r"masks of 1 anomalous images mark nothing or everything: cut/1\.png"):
        load_task(config(root))


def test_masks_drawn_the_other_way_round(root: Path, truth: Truth) -> None:
    """One large defect among small ones may be; most masks of most of the image are inverted."""
    folder = root / "ground_truth" / "cut"
    save(folder / "0.png", (~truth).astype(np.uint8) * 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(config(root))
    save(folder / "1.png", (~truth).astype(np.uint8) * 255)
    with pytest.warns(UserWarning, match=r"2 of 2 masks mark more than half of their image as defect: .* invert"):
        load_task(config(root))


def test_several_masks_of_an_image(root: Path) -> None:
    """MVTec LOCO: a folder of masks for each image."""
    for part in range(2):
        mask = np.zeros((20, 30), np.uint8)
        mask[part * 10] = 255
        save(root / "ground_truth" / "cut" / "1" / f"00{part}.png", mask)
    (root / "ground_truth" / "cut" / "1.png").unlink()
    assert masks_of(root)[1].any(1).nonzero().flatten().tolist() == [0, 8]


@pytest.mark.parametrize("table", [False, True])
def test_the_layout_of_visa(tmp_path: Path, truth: Truth, table: bool) -> None:
    source, lines = np.random.default_rng(0), ["object,split,label,image,mask"]
    for part, count in (("Normal", 6), ("Anomaly", 2)):
        for i in range(count):
            save(tmp_path / "candle/Data/Images" / part / f"{i:03}.JPG", source.integers(0, 255, (20, 30, 3), np.uint8))
            split = "train" if part == "Normal" and i < 4 else "test"
            lines.append(f"candle,{split},{part},candle/Data/Images/{part}/{i:03}.JPG,")
    for i in range(2):
        save(tmp_path / "candle/Data/Masks/Anomaly" / f"{i:03}.png", truth.astype(np.uint8) * (i + 1))
    if table:
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(lines))
    task = load_task(config(tmp_path / "candle", test_fraction=0.34))
    assert (len(task.train), task.test_is_anomaly.tolist()) == (4, [False, False, True, True])
    assert task.test_masks is not None
    assert task.test_masks.flatten(1).any(1).tolist() == [False, False, True, True]
    assert task.trained_on is not None
    if table:
        assert task.trained_on.normal[0] == "Data/Images/Normal/000.JPG"
