"""The shallow baselines: on real data, and on what they must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anomem.data import DataConfig, ResidentImages, Task, load_task
from anomem.errors import ArgumentError
from anomem.evaluate import auroc, baselines, patch_pca_maps, pixel_auroc
from anomem.testing import assert_within_budget


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(DataConfig(normal="3"))


@pytest.fixture(scope="module")
def found(task: Task) -> dict[str, Tensor]:
    return baselines(task)


def test_all_tell_a_three_from_other_digits(task: Task, found: dict[str, Tensor]) -> None:
    assert list(found) == ["kNN-3", "one-class SVM", "LOF", "isolation forest"]
    for name, scores in found.items():
        assert scores.shape == (len(task.test),)
        assert scores.dtype == torch.float64
        assert auroc(scores, task.test_is_anomaly) > 0.9, name


def test_nearest_neighbours_are_what_they_say(task: Task, found: dict[str, Tensor]) -> None:
    train, test = (images.images.flatten(1).double() / 255 for images in (task.train, task.test))
    expected = torch.cdist(test, train).topk(3, largest=False).values.mean(1)
    assert_within_budget(found["kNN-3"].float(), expected.float(), expected, ulps=256)


def test_seed_decides(task: Task) -> None:
    first, second, other = (baselines(task, seed, at_most=60) for seed in (0, 0, 1))
    for name in first:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])


def test_labelled_anomalies_are_not_used(found: dict[str, Tensor]) -> None:
    exposed = load_task(DataConfig(normal="3", outlier_ratio=0.1))
    assert not bool(exposed.train_is_normal.all())
    for name, scores in baselines(exposed).items():
        assert torch.equal(scores, found[name]), name


def test_two_normals_are_enough_and_one_is_not(task: Task) -> None:
    pair = replace(task, train=ResidentImages(task.train.images[:2]), train_is_normal=torch.tensor([True, True]))
    assert all(scores.isfinite().all() for scores in baselines(pair).values())
    alone = replace(task, train=ResidentImages(task.train.images[:1]), train_is_normal=torch.tensor([True]))
    with pytest.raises(ArgumentError, match="`task`: expected at least two normal training images, received 1"):
        baselines(alone)


def test_patch_pca_finds_scratches_on_brick() -> None:
    config = DataConfig("textures", normal="brick", anomalies="scratch", train_patches=40, test_patches=20)
    task = load_task(config)
    maps = patch_pca_maps(task, at_most=40_000)
    assert maps.shape == (40, 64, 64)
    assert task.test_masks is not None
    assert pixel_auroc(maps, task.test_masks) > 0.9


def test_patches_in_the_span_leave_no_residual() -> None:
    """Constant images are all along one direction."""
    constants = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    images, normal = ResidentImages(constants), torch.ones(25, dtype=torch.bool)
    task = Task("constants", "grey", images, normal, images, ~normal, ("grey",) * 25, None, (0.5,), (0.3,), False)
    maps = patch_pca_maps(task, components=1)
    assert_within_budget(maps + 1, torch.ones_like(maps), torch.ones_like(maps).double(), ulps=64)


def test_bad_arguments(task: Task) -> None:
    with pytest.raises(ArgumentError, match="`side`: expected at most 16, received 17"):
        patch_pca_maps(task, side=17)
    with pytest.raises(ArgumentError, match="`components`: expected from 1 to 3, received 4"):
        patch_pca_maps(task, side=2, components=4)
