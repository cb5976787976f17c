"""Images on disk, and everything that can be wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anomem.data import DataConfig, StreamedImages, image_files, load_task, read_image
from anomem.errors import ArgumentError, UserError


def save(path: Path, value: int, size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, dtype=np.uint8)
    pixels[:, : size[1] // 2] = 0
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(4):
        save(tmp_path / "train" / "good" / f"{i}.png", 100 + i)
    for i in range(3):
        save(tmp_path / "test" / "good" / f"{i}.png", 110 + i)
        save(tmp_path / "test" / "hole" / f"{i}.jpg", 200)
        save(tmp_path / "test" / "spot" / f"{i}.png", 250)
    (tmp_path / "test" / "hole" / "notes.txt").write_text("not an image")
    return tmp_path


def config(root: Path, **changed: object) -> DataConfig:
    return replace(DataConfig("folder", root=str(root), image_size=16), **changed)


def read_all(given: DataConfig) -> None:
    task = load_task(given)
    for _ in task.test.batches(torch.arange(len(task.test)), 4):
        pass


def add_masks(root: Path) -> None:
    for kind, suffix in (("hole", ""), ("spot", "_mask")):
        for i in range(3):
            mask = np.zeros((20, 30), dtype=np.uint8)
            mask[:10] = 255
            path = root / "ground_truth" / kind / f"{i}{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)


def test_layout(root: Path) -> None:
    task = load_task(config(root))
    assert (len(task.train), len(task.test)) == (4, 9)
    assert (task.train.channels, task.train.size) == (3, (16, 16))
    assert task.test_kinds == ("good",) * 3 + ("hole",) * 3 + ("spot",) * 3
    assert task.test_is_anomaly.tolist() == [False] * 3 + [True] * 6
    assert task.test_paths is not None
    assert Path(task.test_paths[3]) == root / "test" / "hole" / "0.jpg"
    assert task.test_masks is None
    assert task.aligned
    assert not load_task(config(root, aligned=False)).aligned
    first, _ = next(task.train.batches(torch.tensor([0]), 1))
    assert set(first[0, :, 0, 0].tolist()) == {0}
    assert set(first[0, :, 0, -1].tolist()) == {100}


def test_grey_and_streamed(root: Path) -> None:
    resident = load_task(config(root, grey=True))
    streamed = load_task(config(root, grey=True, resident_megabytes=0, workers=0))
    assert isinstance(streamed.train, StreamedImages)
    assert streamed.train.channels == 1
    order = torch.tensor([2, 0, 1])
    for mine, theirs in zip(streamed.test.batches(order, 2), resident.test.batches(order, 2), strict=True):
        assert torch.equal(mine[0], theirs[0])
    assert streamed.mean == resident.mean


def test_masks(root: Path) -> None:
    add_masks(root)
    lower_half_is_clean(load_task(config(root)).test_masks)


def lower_half_is_clean(masks: Tensor | None) -> None:
    assert masks is not None
    assert masks.shape == (9, 16, 16)
    assert not bool(masks[:3].any())
    assert bool(masks[3:, :8].all())
    assert not bool(masks[3:, 8:].any())


def test_labelled_anomalies_leave_the_test(root: Path) -> None:
    add_masks(root)
    task = load_task(config(root, outlier_ratio=0.5))
    assert task.train_is_normal.tolist() == [True] * 4 + [False] * 2
    assert len(task.test) == len(task.test_kinds) == 7
    assert task.test_masks is not None
    assert task.test_masks.flatten(1).any(1).tolist() == task.test_is_anomaly.tolist()


def test_several_normal_classes(root: Path) -> None:
    save(root / "train" / "nuts" / "0.png", 1)
    save(root / "train" / "nuts" / "1.png", 2)
    assert load_task(config(root, normal="nuts")).normal == "nuts"
    message = r"`data\.normal`: expected one of good, nuts or an index below 2, received 'bolts'"
    with pytest.raises(UserError, match=message):
        load_task(config(root, normal="bolts"))


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"expected folders of images in .*none/train, found none; the layout is train/"
    ):
        load_task(config(tmp_path / "none"))


def test_empty_folder(root: Path) -> None:
    (root / "test" / "empty").mkdir()
    with pytest.raises(UserError, match=r"test/empty: expected image files \(.png, .*\), found none; add some"):
        load_task(config(root))
    with pytest.raises(UserError, match=r"expected a folder of images at .*nowhere, which is not there"):
        image_files(root / "nowhere")


@pytest.mark.parametrize("content", [b"", b"not a picture", None], ids=["empty", "text", "truncated"])
@pytest.mark.parametrize("limit", [0, 100], ids=["streamed", "resident"])
def test_unreadable_image(root: Path, content: bytes | None, limit: int) -> None:
    path = root / "test" / "good" / "1.png"
    if content is None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1\.png: expected a readable image \(.*\); repair or remove the file"):
        read_all(config(root, resident_megabytes=limit, workers=0))


def test_fewer_than_two_images(root: Path) -> None:
    for path in sorted((root / "train" / "good").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match="expected at least two normal training images, found 1; add images"):
        load_task(config(root))


def test_one_class_only(root: Path) -> None:
    for path in (root / "test").rglob("*"):
        if path.is_file() and path.parent.name == "good":
            path.unlink()
    (root / "test" / "good").rmdir()
    with pytest.raises(UserError, match=r"expected normal and anomalous test images, found 6 of one class only \(anom"):
        load_task(config(root))


def test_missing_mask(root: Path) -> None:
    add_masks(root)
    (root / "ground_truth" / "spot" / "2_mask.png").unlink()
    with pytest.raises(UserError, match=r"expected the mask of 2.png as 2.png or 2_mask.png, found neither; add it"):
        load_task(config(root))


def ramp(path: Path, kind: str) -> None:
    """The same brightnesses from 0 to 1 in each kind of file."""
    grey = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    colour = np.stack([grey] * 3, -1)
    pictures = {
        "8 bits": Image.fromarray(grey),
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
        "float": Image.fromarray(grey.astype(np.float32) / 255),
        "colour": Image.fromarray(colour),
        "transparent": Image.fromarray(np.concatenate([colour, np.zeros_like(colour[..., :1])], -1)),
        "grey, transparent": Image.merge("LA", [Image.fromarray(grey)] * 2),
    }
    pictures[kind].save(path)


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "float", "colour", "transparent", "grey, transparent"])
@pytest.mark.parametrize("grey", [False, True])
def test_every_depth_and_mode_is_the_same_picture(tmp_path: Path, kind: str, grey: bool) -> None:
    path = tmp_path / f"größe 漢字.{'tiff' if kind == 'float' else 'png'}"
    ramp(path, kind)
    pixels = read_image(path, grey)
    assert pixels.shape == (1 if grey else 3, 4, 256)
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8).expand_as(pixels))


def test_numbers_that_are_no_brightness(tmp_path: Path) -> None:
    for name, pixels in (("deep", np.full((4, 4), 70000, np.int32)), ("bright", np.full((4, 4), 2, np.float32))):
        path = tmp_path / f"{name}.tiff"
        Image.fromarray(pixels).save(path)
        with pytest.raises(ArgumentError, match=rf"{name}\.tiff`: expected (uint8|floating pixels from 0 to 1)"):
            read_image(path)


def test_masks_of_16_bits_keep_small_numbers(root: Path) -> None:
    add_masks(root)
    for path in (root / "ground_truth").rglob("*.png"):
        Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint16)).save(path)
    lower_half_is_clean(load_task(config(root)).test_masks)


def test_what_file_managers_leave_behind(root: Path) -> None:
    (root / "train" / "good" / "._0.png").write_bytes(b"\0\5\x16\7")
    (root / "train" / "good" / "thumbs.png").mkdir()
    assert len(load_task(config(root)).train) == 4
