"""Resident and streamed sets give the same batches."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from anomem.data import Images, ResidentImages, StreamedImages, convert
from anomem.data.convert import read_image
from anomem.data.images import channel_statistics, resident_or_streamed
from anomem.errors import ArgumentError, UserError


class Numbered(Dataset[Tensor]):
    """Image i is filled with i: [2, 3, 5] uint8."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((2, 3, 5), index, dtype=torch.uint8)


SETS = {
    "resident": lambda: ResidentImages(torch.stack([Numbered(7)[i] for i in range(7)])),
    "streamed": lambda: StreamedImages(Numbered(7), workers=0),
    "streamed by a process": lambda: StreamedImages(Numbered(7), workers=1),
}


@pytest.fixture(params=SETS)
def images(request: pytest.FixtureRequest) -> Images:
    return SETS[request.param]()


def test_batches_follow_the_order(images: Images) -> None:
    order = torch.tensor([6, 0, 3, 3, 5, 1, 2])
    batches = list(images.batches(order, 3))
    assert [len(batch) for batch, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([part for _, part in batches]), order)
    for batch, part in batches:
        assert batch.shape == (len(part), 2, 3, 5)
        assert batch.dtype == torch.uint8
        assert torch.equal(batch[:, 0, 0, 0].long(), part)


def test_shape(images: Images) -> None:
    assert len(images) == 7
    assert images.channels == 2
    assert images.size == (3, 5)
    assert images.to("cpu").size == (3, 5)


def test_bad_orders(images: Images) -> None:
    with pytest.raises(ArgumentError, match=r"`order`: expected indices from 0 to 6 \(images\), received 0 to 7"):
        next(images.batches(torch.tensor([0, 7]), 2))
    with pytest.raises(ArgumentError, match=r"`order`: expected int64, received torch\.int32"):
        next(images.batches(torch.tensor([0], dtype=torch.int32), 2))
    with pytest.raises(ArgumentError, match="`batch_size`: expected an integer ≥ 1, received 0"):
        next(images.batches(torch.tensor([0]), 0))


def test_channel_statistics(images: Images) -> None:
    values = torch.arange(7).double() / 255
    mean, std, spread = channel_statistics(images, 7)
    assert mean == pytest.approx([float(values.mean())] * 2)
    assert std == pytest.approx([float(values.std(correction=0))] * 2)
    assert spread == pytest.approx(6 / 255)
    mean, std, _ = channel_statistics(images, 1)
    assert mean == (0.0, 0.0)
    assert std == (1.0, 1.0), "a constant channel must be safe to divide by"


def test_large_sets_are_streamed() -> None:
    megabytes = 7 * 30 / 2**20
    assert isinstance(resident_or_streamed(Numbered(7), megabytes, 0), ResidentImages)
    assert isinstance(resident_or_streamed(Numbered(8), megabytes, 0), StreamedImages)
    with pytest.raises(ArgumentError, match="`dataset`: expected at least one image, received none"):
        resident_or_streamed(Numbered(0), megabytes, 0)


def test_only_uint8_is_resident() -> None:
    with pytest.raises(ArgumentError, match=r"`images`: expected uint8, received torch\.float32"):
        ResidentImages(torch.zeros(2, 1, 4, 4))


class Broken(Numbered):
    """Image 4 cannot be read, image 5 has another shape."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 4:
            raise UserError("4.png: expected a readable image")
        return super().__getitem__(index)[:, : 2 if index == 5 else 3]


class Signalled(Numbered):
    """The worker that reads image 4 receives the signals of a job that is being stopped."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 4:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return super().__getitem__(index)


def test_workers_outlive_the_signals_of_a_job() -> None:
    """The main process ends its step with the images they read, and saves."""
    images = StreamedImages(Signalled(7), workers=1)
    assert torch.cat([index for _, index in images.batches(torch.arange(7), 3)]).tolist() == list(range(7))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_one_sentence(workers: int) -> None:
    images = StreamedImages(Broken(7), workers)
    with pytest.raises(UserError, match=r"^4.png: expected a readable image$"):
        list(images.batches(torch.arange(7), 3))
    sentence = (
        r"^`dataset`: expected images of one shape, \[2, 3, 5\] as image 6, received \[2, 2, 5\] for image 5; set"
    )
    with pytest.raises(ArgumentError, match=sentence):
        list(images.batches(torch.tensor([6, 5]), 3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_fork_opens_images_while_a_thread_of_its_parent_does(tmp_path: Path) -> None:
    """A worker of a DataLoader: the lock around Pillow's limit was held for ever in it."""
    file = tmp_path / "image.png"
    Image.new("L", (4, 4), 7).save(file)
    with convert._limit:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that hangs
            os._exit(int(read_image(file, grey=True).sum()) - 16 * 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
