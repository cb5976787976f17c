"""Splits of the bundled data sets: deterministic, disjoint, by class, ratio and seed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from anomem.data import DATASETS, DataConfig, Dataset, Images, Task, load_task
from anomem.data.bundled import load_digits
from anomem.data.config import Anomalies
from anomem.data.task import stratified_split
from anomem.data.textures import DEFECTS, PATCH, add_defect, photograph, split_picture
from anomem.errors import ArgumentError, UserError

TEXTURES = DataConfig("textures", normal="gravel", train_patches=20, test_patches=13)


def everything(images: Images) -> Tensor:
    return torch.cat([batch for batch, _ in images.batches(torch.arange(len(images)), 256)])


def same(one: Task, other: Task) -> bool:
    return (
        torch.equal(everything(one.train), everything(other.train))
        and torch.equal(everything(one.test), everything(other.test))
        and one.test_kinds == other.test_kinds
    )


@pytest.mark.parametrize("config", [DataConfig(normal="3"), DataConfig(normal="3", outlier_ratio=0.1), TEXTURES])
def test_seed_decides(config: DataConfig) -> None:
    assert same(load_task(config), load_task(config))
    assert not same(load_task(config), load_task(replace(config, seed=1)))


def test_digits_one_class() -> None:
    task = load_task(DataConfig(normal="3"))
    assert task.name == "digits 3"
    assert task.train.size == (16, 16)
    assert bool(task.train_is_normal.all())
    assert len(task.train) == 183 - round(183 * 0.3)  # there are 183 threes
    assert [kind != "3" for kind in task.test_kinds] == task.test_is_anomaly.tolist()
    assert len(task.test) + len(stratified_split(load_digits().labels, 0.3, 0)[0]) == 1797
    assert task.aligned
    pixels = everything(task.train).double() / 255
    assert task.mean == pytest.approx([float(pixels.mean())])
    assert task.std == pytest.approx([float(pixels.std(correction=0))])


def test_outlier_exposure() -> None:
    plain, exposed = (load_task(DataConfig(normal="8", outlier_ratio=ratio)) for ratio in (0.0, 0.1))
    normals = len(plain.train)
    assert int((~exposed.train_is_normal).sum()) == round(normals * 0.1)
    assert torch.equal(everything(exposed.train)[:normals], everything(plain.train)), "normals come first"
    assert torch.equal(everything(exposed.test), everything(plain.test))
    assert exposed.mean == plain.mean


def test_no_image_is_in_both_parts() -> None:
    labels = torch.arange(10).repeat_interleave(11)
    train, test = stratified_split(labels, 0.3, 5)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(110))
    assert torch.bincount(labels[test]).tolist() == [3] * 10


@pytest.mark.parametrize("seed", range(4))
def test_textures_share_no_pixel_between_parts(seed: int) -> None:
    numbers = torch.arange(200 * 300).view(200, 300)
    train, test = split_picture(numbers, 0.35, torch.Generator().manual_seed(seed))
    assert not set(train.flatten().tolist()) & set(test.flatten().tolist())
    assert train.numel() + test.numel() == numbers.numel()
    assert min(*train.shape, *test.shape) >= PATCH


def test_textures_against_photographs() -> None:
    task = load_task(TEXTURES)
    assert task.train.size == (64, 64)
    assert task.train.channels == 1
    assert (len(task.train), len(task.test)) == (20, 26)
    assert set(task.test_kinds[13:]) >= {"brick", "grass", "camera", "coins"}
    assert task.test_masks is None
    assert not task.aligned
    assert load_task(replace(TEXTURES, image_size=32)).test.size == (32, 32)


@pytest.mark.parametrize("kind", DEFECTS)
def test_masks_are_exact(kind: str) -> None:
    picture = photograph("gravel")
    for seed in range(20):
        image = picture[seed : seed + 64, :64][None]
        damaged, mask = add_defect(image, kind, torch.Generator().manual_seed(seed))
        changed = (damaged != image)[0]
        assert not bool((changed & ~mask).any()), "a pixel outside of the mask has changed"
        assert 0.003 < float(mask.float().mean()) < 0.25
        assert float(changed[mask].float().mean()) > 0.9


def test_defects_in_turn_and_labelled() -> None:
    task = load_task(replace(TEXTURES, anomalies="defects", outlier_ratio=0.2))
    assert set(task.test_kinds) == {"gravel", *DEFECTS}
    assert task.test_masks is not None
    assert task.test_masks.shape == (26, 64, 64)
    assert torch.equal(task.test_masks.flatten(1).any(1), task.test_is_anomaly)
    assert int((~task.train_is_normal).sum()) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"outlier_ratio": -1}, "`data.outlier_ratio`: expected a ratio ≥ 0 .*, received -1"),
        ({"outlier_ratio": float("inf")}, "`data.outlier_ratio`: expected a finite number, received inf"),
        ({"test_fraction": 0}, "`data.test_fraction`: expected a fraction between 0 and 1, received 0"),
        ({"anomalies": "dust"}, "`data.anomalies`: expected one of 'photographs', .*received 'dust'"),
        ({"train_patches": 1}, "`data.train_patches`: expected an integer ≥ 2, received 1"),
        ({"test_patches": 0}, "`data.test_patches`: expected an integer ≥ 1, received 0"),
        ({"resident_megabytes": -1}, "`data.resident_megabytes`: expected an integer ≥ 0, received -1"),
        ({"workers": -1}, "`data.workers`: expected an integer ≥ 0, received -1"),
    ],
)
def test_settings_no_task_can_have(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DataConfig(**changed)
    with pytest.raises(ArgumentError, match=message):
        replace(DataConfig(), **changed)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DataConfig("mnist"),
            "`data.dataset`: expected one of 'digits', 'textures', 'cifar10', .*, received 'mnist'",
        ),
        (DataConfig(normal="10"), "`data.normal`: expected one of 0, 1, .* or an index below 10, received '10'"),
        (DataConfig(outlier_ratio=50), r"`data.outlier_ratio`: expected at most .*, received 50 \("),
        (DataConfig(test_fraction=0.995), "expected at least two normal training images, found 1"),
        (DataConfig(test_fraction=0.001), "expected normal and anomalous test images, found 0"),
        (replace(TEXTURES, test_fraction=0.05), "`data.test_fraction`: expected from 0.125 to 0.875"),
    ],
)
def test_settings_that_do_not_fit_the_data(config: DataConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(config)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        DataConfig().seed = 1  # type: ignore[misc]


def test_names_are_those_of_the_types() -> None:
    assert tuple(DATASETS) == get_args(Dataset)
    assert set(DEFECTS) < set(get_args(Anomalies))


def test_the_error_is_an_argument_error() -> None:
    with pytest.raises(ArgumentError):
        load_task(DataConfig("mnist"))


def test_task_moves_as_a_whole() -> None:
    task = load_task(replace(TEXTURES, anomalies="blot")).to("meta")
    assert task.train_is_normal.device.type == task.test_is_anomaly.device.type == "meta"
    assert task.test_masks is not None
    assert task.test_masks.device.type == "meta"
    assert next(task.train.to("meta").batches(torch.zeros(2, dtype=torch.int64, device="meta"), 2))[0].is_meta
