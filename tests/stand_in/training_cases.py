"""Training on a GPU: the host does not wait between two rows of the log. test_stand_in.py runs these cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomem.augment import AugmentConfig
from anomem.data import DataConfig, Images, StreamedImages, load_task
from anomem.models import DeviationHead, ModelConfig, NetworkEncoder
from anomem.train import LossConfig, OptimizerConfig, RunConfig, Stage2Config, TrainConfig, stage1
from anomem.train.captured import WARMUP
from anomem.train.run import head_for, model_for
from anomem.train.stage1 import train_stage1
from anomem.train.stage2 import train_stage2
from tests.stand_in.calls import HAVE_NATIVE
from tests.stand_in.recording import Entry, of, recorded, recorded_so_far

EVERY = 4
ONE_ROW = Counter({("download", "cudaMemcpyAsync"): 1, ("wait", "cudaEventSynchronize"): 1})


@pytest.fixture(autouse=True)
def without_gpu() -> Iterator[None]:
    """cuDNN asks for a real GPU; torch's own convolutions do not. A unit that nothing computed may be no number."""
    with torch.backends.cudnn.flags(enabled=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviationHead, "fit_rms", lambda *_: None)
        yield


def config_of(steps: int, **settings: Any) -> TrainConfig:
    optimizer = OptimizerConfig(steps=steps, batch_size=32, warmup=2)
    return TrainConfig(
        data=DataConfig(normal="3"),
        augment=AugmentConfig.for_dataset("digits"),
        model=ModelConfig(prototypes=(8,), impl=settings.pop("impl", "auto")),
        loss=LossConfig(max_positions=2),
        optimizer=optimizer,
        stage2=Stage2Config(hidden=4, embedding=4, optimizer=replace(optimizer, clip=1.0)),
        run=RunConfig(device="cuda", log_every=settings.pop("log_every", EVERY), **settings),
        synthetic_outliers=0.25,
        prototypes_from="normal",  # features would add uncounted calls at the first step
    )


def host_calls(config: TrainConfig, stage: int = 1, *, streamed: bool = False) -> Counter[tuple[str, str]]:
    """How often the host waits for the GPU, sends to it or receives from it, in a whole stage."""
    task = load_task(config.data)
    model = model_for(config, task)
    images: Images = task.to(model.device).train
    if streamed:
        images = StreamedImages(list(task.train.images), workers=0, device=model.device)
    torch.cuda.empty_cache()  # as torch does before a capture, which counts as a wait
    with recorded() as entries:
        if stage == 1:
            train_stage1(model, images, None, config, quiet=True)
        else:
            train_stage2(model, head_for(config, model), images, None, config, quiet=True)
    assert not of(entries, "fault")
    return Counter((e.kind, e.what) for e in of(entries, "wait", "upload", "download"))


def added_by_two_rows(stage: int = 1, *, streamed: bool = False, **settings: Any) -> Counter[tuple[str, str]]:
    """The calls that two more rows of the log add to a short stage."""
    few, more = (host_calls(config_of(n, **settings), stage, streamed=streamed) for n in (EVERY, 3 * EVERY))
    more.subtract(few)
    return Counter({call: times for call, times in more.items() if times != 0})


@pytest.fixture(scope="module", autouse=True)
def first_steps() -> None:
    """Does once what is not counted: constants of the augmentation go to the GPU at the first step."""
    with torch.backends.cudnn.flags(enabled=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomem.measuring.check", lambda *_: "passed")
        host_calls(config_of(EVERY))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("impl", ["auto", "triton", *(["native"] if HAVE_NATIVE else [])])
def test_a_step_does_not_wait(impl: str, stage: int) -> None:
    assert added_by_two_rows(stage, impl=impl) == ONE_ROW + ONE_ROW


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"memory_format": "channels_last"}], ids=str)
def test_settings_of_a_run_do_not_wait(settings: dict[str, Any]) -> None:
    assert added_by_two_rows(**settings) == ONE_ROW + ONE_ROW


def test_images_of_the_host_are_sent_without_waiting() -> None:
    added = added_by_two_rows(streamed=True)
    assert added.pop(("upload", "cudaMemcpyAsync")) == 2 * EVERY
    assert added == ONE_ROW + ONE_ROW


class Waits(nn.Module):
    """A network whose host reads a value of its map, or waits for the GPU as torch's search does not see."""

    def __init__(self, unseen: bool = False) -> None:
        super().__init__()
        self.convolution, self.unseen = nn.Conv2d(1, 4, 3, 2), unseen

    def forward(self, images: Tensor) -> list[Tensor]:
        found = self.convolution(images)
        if not self.unseen:
            float(found.detach().sum())
        elif found.is_cuda:
            torch.cuda.synchronize()
        return [found]


def steps_of(config: TrainConfig, encoder: NetworkEncoder | None = None) -> list[list[Entry]]:
    """The log of every step of stage 1, from one update of the rates to the next."""
    task = load_task(config.data)
    model = model_for(config, task, encoder)
    marks: list[int] = []
    original = stage1.set_rates

    def marked(*given: Any) -> None:
        marks.append(recorded_so_far())
        original(*given)

    with pytest.MonkeyPatch.context() as patch, recorded() as entries:
        patch.setattr(stage1, "set_rates", marked)
        train_stage1(model, task.to(model.device).train, None, config, quiet=True)
    return [entries[start:stop] for start, stop in pairwise([*marks, len(entries)])]


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16", "memory_format": "channels_last"}, {"ema": 0.9, "clip": 1.0}], ids=str
)
def test_a_step_is_one_launch_of_a_graph(settings: dict[str, Any]) -> None:
    """Beside it: the batch's copy, the rates, and the seeds of the generators, whatever the network."""
    options = {name: settings[name] for name in ("ema", "clip") if name in settings}
    config = config_of(7, log_every=100, **{k: v for k, v in settings.items() if k not in options})
    config = replace(config, optimizer=replace(config.optimizer, **options))
    *steps, last = steps_of(config)
    eager, (capturing, *captured) = steps[:WARMUP], steps[WARMUP:]
    assert not any(of(step, "graph") for step in eager)
    assert any(entry.when == "captured" for entry in capturing)
    for step in captured:
        (graph,) = of(step, "graph")
        replayed = [entry for entry in step if entry.when == "replayed"]
        assert graph.bytes == len(replayed)
        beside = of([entry for entry in step if entry.when == "now"], "launch", "copy", "fill")
        assert len(beside) < 24 < 100 < len(replayed)
        assert not of(step, "upload", "download", "wait")
    names = Counter(entry.what for entry in eager[-1] if entry.kind == "launch")
    found = Counter(entry.what for entry in captured[0] if entry.kind == "launch")
    assert not names - found  # all of the eager step's kernels
    assert last


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_why() -> None:
    config = config_of(6, log_every=100)
    with pytest.warns(
        RuntimeWarning, match=r"stage 1 runs without a CUDA graph: the host waits for the GPU in .*cases"
    ):
        steps = steps_of(config, NetworkEncoder(Waits(), (16, 16), 1))
    assert not any(of(step, "graph") for step in steps)
    with pytest.warns(RuntimeWarning, match="runs without a CUDA graph: .*capture"):
        _, eager, *_, after, _ = steps_of(config, NetworkEncoder(Waits(unseen=True), (16, 16), 1))
    names, expected = (Counter(entry.what for entry in of(step, "launch")) for step in (after, eager))
    assert names == expected
    assert {entry.when for entry in after} == {"now"}
    for changes in ({"micro_batch": 8}, {"accumulate": 2}):
        in_parts = replace(config, optimizer=replace(config.optimizer, **changes))
        assert not any(of(step, "graph") for step in steps_of(in_parts))
    assert not any(of(step, "graph") for step in steps_of(config_of(6, log_every=100, cuda_graph=False)))
