"""Data sets and networks of one's own, as the README shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.datasets import FakeData

import anomem.train
from anomem.cli import main
from anomem.data import DataConfig, Task, task_from_dataset
from anomem.errors import ArgumentError, UserError
from anomem.models import NetworkEncoder, build_model
from anomem.train import TrainConfig, load_scorer, resume, train
from anomem.train.checkpoint import load_checkpoint

README = Path(__file__).resolve().parents[2] / "README.md"


class Pyramid(nn.Module):
    """Two maps of an image; the first convolution is pretrained and stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2).requires_grad_(False)
        self.second = nn.Conv2d(4, 6, 3, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.first(images).relu()
        return {"fine": fine, "coarse": self.second(fine)}


@pytest.fixture
def config(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, data=DataConfig("mine", normal="0"), synthetic_outliers=0.0)


@pytest.fixture
def task(config: TrainConfig) -> Task:
    return task_from_dataset(FakeData(24, (3, 20, 28), num_classes=2), config=config.data)


def encoder(size: tuple[int, int] = (20, 28)) -> NetworkEncoder:
    return NetworkEncoder(Pyramid(), size)


def test_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: TrainConfig) -> None:
    (block,) = README.read_text(encoding="utf-8").split("<!-- run by tests/train/test_own.py -->\n```python\n")[1:]
    source = block[: block.index("```")]
    assert source.count('weights="DEFAULT"') == 1
    monkeypatch.chdir(tmp_path)
    small = replace(config, run=replace(config.run, directory=None))
    monkeypatch.setattr(anomem.train, "preset", lambda name: {"folder": small}[name])
    given = {"dataset": FakeData(24, (3, 40, 50), num_classes=2), "images": torch.rand(2, 3, 64, 64)}
    exec(compile(source.replace('weights="DEFAULT"', ""), "README", "exec"), given)
    assert given["run"] == Path("runs/mine-0-0")
    assert {"auroc", "average_precision", "fpr_at_95_tpr"} == given["metrics"].keys()
    assert given["scored"].scores["detector"].shape == (2,)
    assert given["scored"].maps["detector"].shape == (2, 64, 64)


def test_a_network_is_trained_where_it_may_be(config: TrainConfig, task: Task) -> None:
    own = encoder()
    assert (own.channels, own.sizes) == ((4, 6), ((9, 13), (4, 6)))
    before = {name: value.clone() for name, value in own.state_dict().items()}
    run = train(config, task=task, encoder=own, quiet=True)
    for name, value in own.state_dict().items():
        assert torch.equal(value, before[name]) == ("first" in name), name
    fresh = encoder()
    scorer = load_scorer(run, encoder=fresh)
    assert scorer.model.encoder is fresh
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("command", ["evaluate", "plot", "score", "train"])
def test_what_a_configuration_does_not_hold_is_asked_for(
    config: TrainConfig, task: Task, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(config, task=task, encoder=encoder(), quiet=True)
    if command == "train":
        (run / "checkpoints" / "scorer.json").unlink()
    options = {"score": ["--run", str(run), str(run)], "train": ["--resume", str(run)]}.get(command, [str(run)])
    if command == "score":
        (run / "a.png").write_bytes(b"")
    capsys.readouterr()
    assert main([command, *options]) == 2
    missing = "encoder" if command == "score" else "task"
    assert f"was given its {missing} from Python" in capsys.readouterr().err


def test_resuming_asks_for_the_same_and_ends_alike(config: TrainConfig, task: Task) -> None:
    torch.manual_seed(0)
    run = train(config, task=task, encoder=encoder(), quiet=True)
    ended = load_checkpoint(run / "checkpoints", "scorer")
    assert ended is not None
    (run / "checkpoints" / "scorer.json").unlink()
    with pytest.raises(UserError, match="given its task from Python"):
        resume(run, encoder=encoder(), quiet=True)
    with pytest.raises(UserError, match="given its encoder from Python"):
        resume(run, task=task, quiet=True)
    resume(run, task=task, encoder=encoder(), quiet=True)
    again = load_checkpoint(run / "checkpoints", "scorer")
    assert again is not None
    assert all(torch.equal(value, again.tensors[name]) for name, value in ended.tensors.items())


def test_images_of_other_channels_are_refused_before_anything_is_written(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, run=replace(config.run, directory=str(tmp_path / "run")))
    grey = task_from_dataset(FakeData(24, (1, 20, 28), num_classes=2), config=config.data)
    with pytest.raises(ArgumentError, match="`encoder`: expected one for images of 1 channels"):
        train(config, task=grey, encoder=encoder(), quiet=True)
    assert not (tmp_path / "run").exists()


def test_runs_of_the_command_line_say_nothing_of_it(tiny: TrainConfig) -> None:
    run = train(tiny, quiet=True)
    assert not (run / "given.json").exists()
    assert json.loads((run / "config.json").read_text())["data"]["dataset"] == "digits"


@pytest.mark.parametrize(
    ("network", "received"),
    [
        (lambda images: [images.mean((2, 3))], r"one that gives \[\(1, 3\)\]"),
        (lambda images: images[0, 0, 0].tolist(), "one that gives .*'float'"),
        (lambda images: {}, "one that gives none"),
    ],
    ids=["vectors", "numbers", "nothing"],
)
def test_a_network_that_gives_no_maps(network: Callable[[Tensor], object], received: str) -> None:
    class Wrong(nn.Module):
        def forward(self, images: Tensor) -> object:
            return network(images)

    with pytest.raises(ArgumentError, match=f"`network`: expected a network that gives maps .*received {received}"):
        NetworkEncoder(Wrong(), (8, 8))


def test_an_encoder_for_images_of_another_size(config: TrainConfig) -> None:
    with pytest.raises(ArgumentError, match=r"`encoder`: expected one for images of \(20, 28\), received \(16, 16\)"):
        build_model(config.model, (20, 28), 3, [0.5] * 3, [0.5] * 3, encoder=encoder((16, 16)))


def test_labelled_anomalies_stand_in_the_configuration_too(config: TrainConfig) -> None:
    exposed = DataConfig("mine", normal="0", outlier_ratio=0.5)
    task = task_from_dataset(FakeData(24, (3, 20, 28), num_classes=2), config=exposed)
    with pytest.raises(ArgumentError, match=r"`config.data.outlier_ratio`: .*received 0.0; make the task from"):
        train(config, task=task, quiet=True)
    run = train(replace(config, data=exposed), task=task, quiet=True)
    assert "stage2" in load_scorer(run).names


def test_a_frozen_encoder_without_a_memory_to_train_is_refused(config: TrainConfig, task: Task) -> None:
    """The backward pass failed in torch's words."""
    frozen = NetworkEncoder(Pyramid().requires_grad_(False), (20, 28))
    config = replace(config, loss=replace(config.loss, positive="view"))
    with pytest.raises(ArgumentError, match=r"`loss.positive`: expected memory, as encoder .* frozen"):
        train(config, task=task, encoder=frozen, quiet=True)
