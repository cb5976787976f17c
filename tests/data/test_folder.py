"""Images on disk, and everything that can be wrong with them."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from anomem.data import (
    DataConfig,
    Images,
    Split,
    StreamedImages,
    image_files,
    load_task,
    read_image,
    task_from_dataset,
    upright_size,
)
from anomem.data.convert import read_mask
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
    message = r"`data\.normal`: expected one of good, nuts, the folders in .*train, received 'bolts'; name the normal"
    with pytest.raises(UserError, match=message):
        load_task(config(root, normal="bolts"))


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a folder of images at .*none, which is not there; create it"):
        load_task(config(tmp_path / "none"))


def test_empty_folder(root: Path) -> None:
    (root / "test" / "empty").mkdir()
    with pytest.raises(UserError, match=r"test/empty: expected image files \(.png, .*\), found none; add some"):
        load_task(config(root))
    with pytest.raises(UserError, match=r"expected a folder of images at .*nowhere, which is not there"):
        image_files(root / "nowhere")
    with pytest.raises(
        UserError, match=r"found none \(folders in it are not searched\); add some, or name one of these: \w+"
    ):
        image_files(root / "test")


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


@pytest.mark.parametrize("missing", ["normal", "anomalous"])
def test_test_images_of_one_kind_do_not_forbid_training(root: Path, missing: str) -> None:
    for kind in ("good",) if missing == "normal" else ("hole", "spot"):
        shutil.rmtree(root / "test" / kind)
    with pytest.warns(UserWarning, match=f"there are no {missing} test images, so that nothing can be measured"):
        task = load_task(config(root))
    assert len(task.test) == (6 if missing == "normal" else 3)


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


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", ".cache", "$RECYCLE.BIN"])
def test_hidden_and_service_folders(root: Path, name: str) -> None:
    add_masks(root)
    expected = load_task(config(root))
    for part in ("train", "train/good", "test", "test/hole", "ground_truth", "ground_truth/hole"):
        save(root / part / name / "0.png", 1)
    task = load_task(config(root))
    assert (task.normal, task.test_kinds, len(task.train)) == ("good", expected.test_kinds, 4)
    assert torch.equal(everything(task.train), everything(expected.train))


def everything(images: Images) -> Tensor:
    return torch.cat([batch for batch, _ in images.batches(torch.arange(len(images)), 256)])


@pytest.mark.parametrize("name", ["Good", "OK", "Normal", "NUTS"])
def test_normal_folders_in_any_case(root: Path, name: str) -> None:
    (root / "train" / "good").rename(root / "train" / "nuts")
    (root / "test" / "good").rename(root / "test" / name)
    assert int(load_task(config(root)).test_is_anomaly.sum()) == 6
    assert load_task(config(root, normal="Nuts")).normal == "nuts"


def test_which_of_two_folders_is_normal_is_asked(root: Path) -> None:
    for i in range(2):
        save(root / "train" / "bad" / f"{i}.png", 1 + i)
    for unnamed in ("", "0"):
        with pytest.raises(ArgumentError, match=r"`data\.normal`: expected one of bad, good, .*received no name; name"):
            load_task(config(root, normal=unnamed))
    assert load_task(config(root, normal="normal")).normal == "good", "the only one that is called so"


def test_another_name_than_the_only_folder(root: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`data\.normal`: expected one of good, .*received 'nuts'"):
        load_task(config(root, normal="nuts"))


def test_a_test_folder_that_grew(root: Path) -> None:
    """Labelled anomalies that were trained on are never tested on."""
    given = config(root, outlier_ratio=0.5)
    before = load_task(given)
    assert before.trained_on is not None
    for i in range(9):
        save(root / "test" / "hole" / f"{i}0.png", 190 + i)
    after = load_task(given, before.trained_on)
    assert after.trained_on == before.trained_on
    assert torch.equal(everything(after.train), everything(before.train))
    assert after.test_paths is not None
    assert len(after.test) == len(before.test) + 9
    assert not {str(root / name) for name in after.trained_on.anomalous} & set(after.test_paths)


def test_a_training_folder_that_changed(root: Path) -> None:
    split = load_task(config(root)).trained_on
    assert split == Split(tuple(f"train/good/{i}.png" for i in range(4)), ())
    save(root / "train" / "good" / "9.png", 7)
    with pytest.warns(UserWarning, match=r"1 images were added since the run began and are not trained on: 9\.png"):
        assert len(load_task(config(root), split).train) == 4
    (root / "train" / "good" / "1.png").unlink()
    with pytest.raises(UserError, match=r"train/good/1\.png: the run was trained on this image, which is not there"):
        load_task(config(root), split)


# Which files are opened.


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tiff"])
def test_only_documented_formats_are_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow runs Ghostscript on PostScript, whatever the suffix."""
    (tmp_path / "marker").write_bytes(b"")
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\nrm {tmp_path / 'marker'}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(gs))
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=r"expected a readable image \(not a PNG, JPEG, .* file\)"):
            read(path)
    assert (tmp_path / "marker").exists(), "another program was started"


@pytest.mark.parametrize("suffix", ["gif", "ico", "tga", "pcx"])
def test_formats_that_are_not_documented(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"x.{suffix}", 9, (16, 16))
    (tmp_path / f"x.{suffix}").rename(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: expected a readable image \(not a PNG"):
        read_image(tmp_path / "x.png")


@pytest.mark.timeout(20)
def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name, kind in (("pipe", "a FIFO"), ("zero", "a device"), ("folder", "a folder")):
        for read in (read_image, read_mask, upright_size):
            with pytest.raises(UserError, match=rf"{name}\.png: expected an image file, received {kind}"):
                read(tmp_path / f"{name}.png")


def test_large_images(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (14000, 13000)).save(path)
    with pytest.raises(
        UserError, match=r"large\.png: expected at most 178 million pixels, received 14000 × 13000; raise"
    ):
        upright_size(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert upright_size(path, 200) == (13000, 14000)
    with pytest.raises(UserError, match=r"expected at most 0\.0001 million pixels"):
        read_image(path, max_megapixels=0.0001)


# Pixels of more than 8 bits.


def twelve_bits(path: Path, seed: int = 0) -> NDArray[np.uint16]:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 4096, (20, 30), dtype=np.uint16)
    pixels[0, 0] = 4095
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_levels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    pixels = twelve_bits(path)
    expected = torch.from_numpy(np.rint(pixels * (255 / 4095)).astype(np.uint8))
    assert torch.equal(read_image(path, True, levels=(0, 4095))[0], expected)
    assert int(read_image(path, True).max()) == 16, "the whole range of 16 bits"
    clipped = read_image(path, True, levels=(1000, 2000))
    assert (int(clipped.min()), int(clipped.max())) == (0, 255)


@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_levels_are_the_values_in_a_pgm_file(tmp_path: Path, white: int) -> None:
    path = tmp_path / "ramp.pgm"
    ramp = np.linspace(0, white, 200).astype(">u2" if white > 255 else np.uint8)
    path.write_bytes(b"P5 200 1 %d\n" % white + ramp.tobytes())
    whole = torch.from_numpy(np.rint(ramp.astype(np.float64) * (255 / white)))
    assert (read_image(path, True)[0, 0] - whole).abs().max() <= 1
    if white > 255:
        half = (ramp.astype(np.float64) * (510 / white)).clip(0, 255)
        found = read_image(path, True, levels=(0, white / 2))[0, 0]
        assert (found - torch.from_numpy(half)).abs().max() <= 1


def test_other_numbers_with_levels(tmp_path: Path) -> None:
    for name, pixels in (("deep", np.full((4, 4), 70000, np.int32)), ("bright", np.full((4, 4), 70000, np.float32))):
        path = tmp_path / f"{name}.tiff"
        Image.fromarray(pixels).save(path)
        assert set(read_image(path, levels=(0, 140000)).flatten().tolist()) == {128}


def test_16_bit_colour_is_refused_where_levels_are_set(tmp_path: Path) -> None:
    path = tmp_path / "colour.ppm"
    path.write_bytes(b"P6 2 2 65535\n" + np.full(12, 4000, ">u2").tobytes())
    assert read_image(path).shape == (3, 2, 2)
    with pytest.raises(ArgumentError, match=r"colour\.ppm`: expected a grey image, where `data\.levels` is set"):
        read_image(path, levels=(0, 4095))


def test_nearly_constant_training_images_are_said(root: Path) -> None:
    for i in range(4):
        (root / "train" / "good" / f"{i}.png").unlink()
        twelve_bits(root / "train" / "good" / f"{i}.png", i)
    with pytest.warns(UserWarning, match=r"nearly constant: .* 1\d of 255 levels; .* 4095: try --data\.levels 0 4095"):
        load_task(config(root))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(config(root, levels=(0, 4095)))


def test_fourteen_bits_are_warned_about(tmp_path: Path) -> None:
    """Not nearly constant, but 64 of 256 levels."""
    source = np.random.default_rng(0)
    pixels = [source.integers(0, 2**14, (20, 30), dtype=np.uint16) for _ in range(3)]
    (tmp_path / "train" / "good").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "train" / "good" / f"{i}.png")
    sentence = r"16 bits whose brightest value is 16\d\d\d of 65535 keep 6\d of 256 levels of grey: .*levels 0 16383"
    with pytest.warns(UserWarning, match=sentence):
        load_task(config(tmp_path))
    own = DataConfig("mine", normal="0", image_size=16)
    with pytest.warns(UserWarning, match=r"brightest value is 16\d\d\d of 65535 .* --data\.levels 0 16383"):
        task_from_dataset([(image, 0) for image in pixels], config=own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_task(config(tmp_path, levels=(0, 16383)))


@pytest.mark.parametrize("levels", [(5, 5), (1, 0), (0, float("inf"))])
def test_levels_no_image_has(levels: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match=r"`data\.levels`: expected two numbers, black < white"):
        DataConfig(levels=levels)


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 10**9), ("workers", 10**6), ("train_patches", 10**12), ("seed", 2**70)]
)
def test_numbers_are_bounded(name: str, value: int) -> None:
    with pytest.raises(ArgumentError, match=rf"`data\.{name}`: expected"):
        DataConfig(**{name: value})
