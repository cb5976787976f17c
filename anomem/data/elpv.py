"""ELPV: 2,624 electroluminescence images of solar cells, 300×300 grey (Buerhop-Lutz et al. 2018, Deitsch et al. 2019).

The images come with the PyPI package `elpv-dataset` under CC BY-NC-SA 4.0: they may be measured on, not shipped.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomem.data.config import DataConfig
from anomem.data.convert import resize
from anomem.data.images import ResidentImages
from anomem.data.task import Rows, Task, assemble, class_index, outlier_count
from anomem.errors import UserError

TYPES = ("mono", "poly")
LICENCE = "CC BY-NC-SA 4.0"
TRAIN_PART = 0.6
"""Of the cells without a defect."""
POOL_PART = 0.3
"""Of the cells with a certain defect: the pool of labelled defects. It is never tested on."""


class Cells(NamedTuple):
    """Every cell of one type, in the order of the data set."""

    images: Tensor
    """[N, 1, H, W] uint8."""
    probabilities: Tensor
    """[N] float64: the annotated probability of a defect, 0, 1/3, 2/3 or 1."""


class Split(NamedTuple):
    """Rows of `Cells`, int64."""

    train: Tensor
    """Cells without a defect, to train on."""
    test_normal: Tensor
    """The other cells without a defect."""
    pool: Tensor
    """Cells with a certain defect that may be used as labels, in the order in which they are used."""
    test_defect: Tensor
    """The other cells with a certain defect."""


def load_cells(kind: str, size: int | tuple[int, int] | None = 128) -> Cells:
    """The cells of one type.

    Args:
        kind: "mono" or "poly", the silicon's crystals.
        size: side in pixels, or (H, W); None keeps 300.

    Raises:
        UserError: `elpv-dataset` is not installed.
    """
    try:
        import elpv_dataset.utils  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"the data set elpv ({LICENCE}) needs the package {error.name}, which is not installed; "
            "pip install anomem[elpv]"
        ) from error
    return _read_cells(kind, size)


@functools.lru_cache(maxsize=2)  # reading takes three seconds; a sweep asks for the same cells again and again
def _read_cells(kind: str, size: int | tuple[int, int] | None) -> Cells:
    from elpv_dataset.utils import load_dataset

    images, probabilities, types = load_dataset()
    of_kind = types == kind
    pixels = torch.from_numpy(np.ascontiguousarray(images[of_kind]))[:, None]
    return Cells(resize(pixels, size), torch.from_numpy(probabilities[of_kind]))


def split_cells(probabilities: Tensor, kind: str, seed: int) -> Split:
    """The protocol: 60% of p = 0 to train on and 40% to test on, 30% of p = 1 a pool and 70% to test on.

    Cells of probability 1/3 and 2/3 are in no part. The cells without a defect are shuffled first, those with one next,
    by one generator.

    Args:
        probabilities: [N] of one type.
        kind: "mono" or "poly".
        seed: of the shuffles.
    """
    generator = np.random.default_rng([seed, TYPES.index(kind)])
    parts = []
    for probability, part in ((0.0, TRAIN_PART), (1.0, POOL_PART)):
        rows = generator.permutation(np.flatnonzero(probabilities.numpy() == probability))
        parts += list(torch.from_numpy(rows).tensor_split([round(len(rows) * part)]))
    return Split(*parts)


def elpv(config: DataConfig) -> Task:
    """Cells of one type without a defect against cells with a certain one.

    `config.normal` is "mono" or "poly". Labelled defects come from the pool: the first `outlier_ratio` × normals.
    `config.test_fraction` is not used.

    Raises:
        ArgumentError: another type, or more labelled defects than the pool has.
        UserError: `elpv-dataset` is not installed.
    """
    kind = TYPES[class_index(config.normal, TYPES)]
    return cells_task(load_cells(kind, 128 if config.image_size is None else config.image_size), kind, config)


def cells_task(cells: Cells, kind: str, config: DataConfig) -> Task:
    """The task `elpv` of cells that are loaded already.

    Args:
        cells: of one type, at any size.
        kind: "mono" or "poly".
        config: seed, labelled defects and alignment.

    Raises:
        ArgumentError: more labelled defects than the pool has.
    """
    split = split_cells(cells.probabilities, kind, config.seed)
    labelled = split.pool[: outlier_count(len(split.train), config.outlier_ratio, len(split.pool))]
    test = torch.cat([split.test_normal, split.test_defect])
    is_anomaly = torch.arange(len(test)) >= len(split.test_normal)
    return assemble(
        f"elpv {kind}",
        kind,
        ResidentImages(cells.images[torch.cat([split.train, labelled])]),
        torch.arange(len(split.train) + len(labelled)) < len(split.train),
        ResidentImages(cells.images[test]),
        ["defect" if anomaly else "normal" for anomaly in is_anomaly.tolist()],
        is_anomaly,
        aligned=True if config.aligned is None else config.aligned,
        rows=Rows(torch.cat([split.train, labelled]), test),
    )
