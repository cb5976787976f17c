"""The profile of the training loop: its phases, its clock, the usual pipeline."""

from __future__ import annotations

import pickle
import time

import pytest
import torch

from anomem.data import ResidentImages
from anomem.train import execution
from benchmarks.profile_training import (
    Apart,
    Event,
    Pipeline,
    Recipe,
    StampedImages,
    TwoViews,
    UsualImages,
    config_of,
    random_images,
    seconds_of_phases,
)

PHASES = ["batch", "augment", "encode", "contrast", "backward", "optimizer"]


def pipeline(usual: bool) -> Pipeline:
    images = random_images(24, 16)
    config = config_of("small", "reference", 6, "cpu")
    return Pipeline("a", config, UsualImages(images, "cpu", 0) if usual else ResidentImages(images), warmup=1)


@pytest.mark.parametrize("usual", [False, True])
def test_the_loop_trains_the_model_and_every_phase_is_measured(usual, tmp_path) -> None:
    one = pipeline(usual)
    before = [p.detach().clone() for p in one.model.parameters()]
    one.measure(2, tmp_path / "trace.json.gz")
    assert any(not torch.equal(p, q) for p, q in zip(before, one.model.parameters(), strict=True))
    assert list(one.milliseconds()) == PHASES
    assert all(value > 0 for value in one.milliseconds().values())
    assert one.seconds[0] > 0
    assert one.cpu_seconds[0] > 0
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


@pytest.mark.parametrize(("impl", "kept"), [("reference", False), ("auto", True)])
def test_plain_pytorch_leaves_the_allocator_alone(impl: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(execution, "keep_freed_memory", lambda: calls.append(1))
    Recipe("a", config_of("small", impl, 6, "cpu"), 24, 16, 1).made().train(1)
    assert bool(calls) == kept


def test_a_pipeline_is_measured_in_a_process_of_its_own(tmp_path) -> None:
    config = config_of("small", "reference", 6, "cpu", "float32", "contiguous")
    with Apart(Recipe("a", config, 24, 16, 1, workers=0)) as one:
        one.measure(1, tmp_path / "trace.json.gz")
        found = one.results()
    assert list(found.milliseconds) == PHASES
    assert min(found.seconds, found.cpu_seconds, found.peak_bytes) > 0
    assert found.executed == {"precision": "float32", "memory_format": "contiguous", "compile": False}
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


def test_both_pipelines_give_views_of_the_same_kind() -> None:
    for usual in (False, True):
        one, seen = pipeline(usual), []
        one.model.register_forward_pre_hook(lambda _, inputs, s=seen: s.append(inputs[0]))
        one.train(4)  # more than an epoch
        assert len(seen) == 6  # warm-up, measured, and one whose batch ends the last of these
        for views in seen:
            assert views.shape == (12, 3, 16, 16)
            assert views.dtype == torch.float32
            assert 0 <= views.min() <= views.max() <= 1
    first, second = TwoViews(random_images(16, 16))[0]
    assert not torch.equal(first, second)


def test_warm_up_and_rest_of_the_loop_are_not_in_the_phases() -> None:
    step = [("encode", 0, 10), ("backward", 10, 40), ("rest", 40, 45), ("optimizer", 50, 60)]
    prefix = {"rest": "aten::"}
    events = [
        Event(prefix.get(name, "anomem.") + name, 100 * i + start, 100 * i + end)
        for i in range(4)
        for name, start, end in step
    ]
    found = seconds_of_phases(events, 1, 2, on_gpu=False)
    assert found == pytest.approx({"encode": 10e-6, "backward": 30e-6, "optimizer": 10e-6})


def test_on_a_gpu_a_phase_has_the_kernels_launched_in_it() -> None:
    events = [
        Event("anomem.backward", 0, 10),
        Event("anomem.optimizer", 10, 20),
        Event("anomem.backward", 20, 30),
        Event("launch of a warm-up step", 5, 6, on_gpu=1000.0),
        Event("launch by another thread", 22, 90, on_gpu=7.0),
        Event("launch between the phases", 31, 32, on_gpu=500.0),
        Event("anomem.optimizer", 40, 50),
        Event("launch", 41, 42, on_gpu=2.0),
    ]
    assert seconds_of_phases(events, 1, 1, on_gpu=True) == pytest.approx({"backward": 7e-6, "optimizer": 2e-6})


def test_the_clock_stops_at_the_batches_it_is_told() -> None:
    stamped = StampedImages(ResidentImages(random_images(8, 4)), "cpu", 1, 3)
    marks = []
    for _ in stamped.batches(torch.arange(8), 2):
        marks.append(time.perf_counter())
        time.sleep(0.01)
    begin, end = stamped.times
    assert marks[0] < begin < marks[1] < marks[2] < end < marks[3]
    assert (len(stamped), stamped.channels, stamped.size) == (8, 3, (4, 4))


def test_the_views_of_the_usual_pipeline_travel_to_workers() -> None:
    views = pickle.loads(pickle.dumps(TwoViews(random_images(2, 16))))
    assert [view.shape for view in views[1]] == [(3, 16, 16)] * 2
