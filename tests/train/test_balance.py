"""Stage 2 sees as many labelled anomalies as normals, and says where another way is better."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anomem.data import ResidentImages, load_task
from anomem.train import preset, train_task
from anomem.train.balance import balanced, few_labels
from anomem.train.run import model_for


def numbered(count: int) -> ResidentImages:
    return ResidentImages(torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 2, 2))


@pytest.mark.parametrize(("normals", "anomalies"), [(9, 2), (3, 7), (4, 4)])
def test_half_of_the_set_are_anomalies(normals: int, anomalies: int) -> None:
    count = normals + anomalies
    is_normal = torch.arange(count) < normals
    images, flags = balanced(numbered(count), is_normal)
    assert flags is not None
    assert int(flags.sum()) * 2 == len(images) == 2 * max(normals, anomalies)
    order = torch.randperm(len(images))
    seen = torch.zeros(count, dtype=torch.int64)
    for batch, index in images.batches(order, 4):
        number = batch[:, 0, 0, 0].long()
        assert torch.equal(is_normal[number], flags[index])
        seen += torch.bincount(number, minlength=count)
    for of_kind in (seen[:normals], seen[normals:]):
        assert int(of_kind.max() - of_kind.min()) <= 1, "none is repeated before the others"
        assert int(of_kind.min()) >= 1


def test_one_kind_is_left_as_it_is() -> None:
    images = numbered(3)
    for flags in (None, torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert balanced(images, flags) == (images, flags)


def test_few_labels_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert few_labels(torch.arange(20) < 18) is None
    assert "2 labelled anomalies for 38 normals" in str(few_labels(torch.arange(40) < 38))
    config = preset("digits")
    config = replace(
        config,
        data=replace(config.data, outlier_ratio=0.05),
        optimizer=replace(config.optimizer, steps=1),
        stage2=replace(config.stage2, optimizer=replace(config.stage2.optimizer, steps=1)),
    )
    task = load_task(config.data)
    train_task(config, task, model_for(config, task))
    assert "stage 2 with 6 labelled anomalies for 128 normals is the weaker way" in capsys.readouterr().out
