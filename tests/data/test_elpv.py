"""Solar cells: the split is the published protocol's, nothing labelled is tested, the licence is named."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from anomem.data import DataConfig
from anomem.data.elpv import TYPES, elpv, load_cells, split_cells
from anomem.errors import ArgumentError, UserError

needs_cells = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs elpv-dataset")
SIZES = {"mono": (353, 235, 94, 219), "poly": (552, 368, 121, 281)}


@pytest.fixture(autouse=True, scope="module")
def read_once() -> Iterator[None]:
    """Reading 2,624 files takes most of these tests' time."""
    if importlib.util.find_spec("elpv_dataset") is None:
        yield
        return
    from elpv_dataset import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_dataset", functools.cache(utils.load_dataset))
        yield


@needs_cells
@pytest.mark.parametrize("kind", TYPES)
def test_sizes_of_the_protocol(kind: str) -> None:
    cells = load_cells(kind, 8)
    assert cells.images.shape[1:] == (1, 8, 8)
    assert sorted(set(cells.probabilities.tolist())) == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-3)
    for seed in range(3):
        assert tuple(len(rows) for rows in split_cells(cells.probabilities, kind, seed)) == SIZES[kind]


def test_split_by_hand() -> None:
    probabilities = torch.tensor([0, 1, 0, 0.667, 1, 0, 0, 0.333, 0, 1], dtype=torch.float64)
    split = split_cells(probabilities, "poly", 5)
    generator = np.random.default_rng([5, 1])
    normals, defects = generator.permutation([0, 2, 5, 6, 8]), generator.permutation([1, 4, 9])
    assert split.train.tolist() == normals[:3].tolist()
    assert split.test_normal.tolist() == normals[3:].tolist()
    assert split.pool.tolist() == defects[:1].tolist()
    assert split.test_defect.tolist() == defects[1:].tolist()
    assert split_cells(probabilities, "mono", 5).train.tolist() != split.train.tolist()


@needs_cells
def test_task() -> None:
    task = elpv(DataConfig("elpv", normal="mono", image_size=16, outlier_ratio=0.05, seed=1))
    assert task.name == "elpv mono"
    assert len(task.train) == 353 + 18
    assert int(task.train_is_normal.sum()) == 353
    assert len(task.test) == 235 + 219
    assert task.test_kinds.count("defect") == 219
    assert task.aligned
    assert task.train.size == (16, 16)
    one_class = elpv(DataConfig("elpv", normal="mono", image_size=16, seed=1))
    assert bool(one_class.train_is_normal.all())
    assert one_class.mean == task.mean


@needs_cells
def test_wrong_settings() -> None:
    with pytest.raises(ArgumentError, match=r"normal.*mono, poly"):
        elpv(DataConfig("elpv", normal="thin-film", image_size=8))
    with pytest.raises(ArgumentError, match=r"outlier_ratio.*94 anomalies"):
        elpv(DataConfig("elpv", normal="mono", image_size=8, outlier_ratio=0.5))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    with pytest.raises(UserError, match=r"CC BY-NC-SA 4.0.*elpv_dataset.*pip install anomem\[elpv\]"):
        load_cells("mono")
