"""Sets made of other sets give the images that were asked for, with their own indices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anomem.data import ResidentImages
from anomem.data.chosen import ChosenImages, JoinedImages
from anomem.errors import ArgumentError


def numbered(first: int, count: int) -> ResidentImages:
    numbers = torch.arange(first, first + count, dtype=torch.uint8)
    return ResidentImages(numbers[:, None, None, None].expand(count, 1, 2, 2))


def read(images: ChosenImages | JoinedImages, order: list[int], batch_size: int) -> tuple[list[int], list[int]]:
    """The numbers and the indices of a set, batch after batch."""
    numbers, indices = [], []
    for batch, index in images.batches(torch.tensor(order, dtype=torch.int64), batch_size):
        assert 0 < len(batch) <= batch_size
        numbers += batch[:, 0, 0, 0].tolist()
        indices += index.tolist()
    return numbers, indices


def test_rows_may_be_repeated() -> None:
    chosen = ChosenImages(numbered(0, 4), torch.tensor([3, 3, 1]))
    assert read(chosen, [2, 0, 1], 2) == ([1, 3, 3], [2, 0, 1])
    assert (len(chosen), chosen.channels, chosen.size, chosen.dataset) == (3, 1, (2, 2), None)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 0, 5, 5, 2, 1, 3], [4, 5], [2], []])
def test_joined_sets_follow_each_other(order: list[int]) -> None:
    joined = JoinedImages(numbered(0, 3), numbered(3, 4))
    assert len(joined) == 7
    for batch_size in (1, 2, 10):
        assert read(joined, order, batch_size) == (order, order)


def test_joined_sets_have_one_shape() -> None:
    other: Tensor = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="second"):
        JoinedImages(numbered(0, 2), ResidentImages(other))
