"""Options of execution: each trains both stages, and says the same as the plain run where it must."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anomem.data import load_task
from anomem.errors import UserError
from anomem.scoring import Scorer, score_images
from anomem.train import (
    RunDirectory,
    TrainConfig,
    execution,
    model_for,
    objective,
    stage1,
    steps,
    train,
    train_stage1,
    train_task,
)
from anomem.train.batches import Average
from anomem.train.checkpoint import load_checkpoint
from anomem.train.execution import compiler_obstacle, multiplies_bf16, settled


def two_steps(config: TrainConfig, **execution: Any) -> tuple[Scorer, dict[str, torch.Tensor]]:
    """A scorer after two steps of each stage, and its scores of the test images."""
    short = {"steps": 2, "warmup": 1}
    config = replace(
        config,
        optimizer=replace(config.optimizer, **short),
        stage2=replace(config.stage2, optimizer=replace(config.stage2.optimizer, **short)),
        run=replace(config.run, **execution),
    )
    task = load_task(config.data)
    scorer = train_task(config, task, model_for(config, task), quiet=True)
    return scorer, score_images(scorer, task.test).scores


def weights(scorer: Scorer) -> torch.Tensor:
    """All parameters of the encoder, one after another."""
    return torch.cat([p.detach().flatten() for p in scorer.model.encoder.parameters()])


FLOAT32: dict[str, Any] = {"precision": "float32", "memory_format": "contiguous"}


@pytest.fixture
def plain(tiny: TrainConfig) -> tuple[Scorer, dict[str, torch.Tensor]]:
    return two_steps(tiny, **FLOAT32)


def test_bf16_keeps_master_weights_in_float32(tiny: TrainConfig, plain: Any) -> None:
    scorer, scores = two_steps(tiny, precision="bf16")
    assert all(p.dtype == torch.float32 for p in scorer.parameters())
    assert all(value.isfinite().all() for value in scores.values())
    start = weights(Scorer(model_for(tiny, load_task(tiny.data)), "per_position", tiny.score))
    moved, moved_bf16 = weights(plain[0]) - start, weights(scorer) - start
    assert not torch.equal(moved, moved_bf16)
    # The steps point the same way, in half the digits.
    assert torch.cosine_similarity(moved, moved_bf16, dim=0) > 0.9


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_contrast_of_bf16_maps_is_in_float32_on_a_cpu(
    tiny: TrainConfig, micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under bfloat16 autocast the encoder's maps are bfloat16, and the contrast's queries are not."""
    seen = []

    def noted(model: Any, criterion: Any, pairs: Any, *rest: Any) -> Any:
        found = objective.multi_scale_loss(model, criterion, pairs, *rest)
        seen.append({torch.is_autocast_enabled("cpu"), found[0].dtype, *(x.dtype for pair in pairs for x in pair)})
        return found

    monkeypatch.setattr(steps, "multi_scale_loss", noted)
    two_steps(replace(tiny, optimizer=replace(tiny.optimizer, micro_batch=micro_batch)), precision="bf16")
    scales = 3
    assert seen == [{False, torch.float32}] * (2 if micro_batch is None else 2 * scales)


def test_channels_last_trains_the_same_weights(tiny: TrainConfig, plain: Any) -> None:
    scorer, scores = two_steps(tiny, precision="float32", memory_format="channels_last")
    convolution = next(p for p in scorer.model.encoder.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    start = weights(Scorer(model_for(tiny, load_task(tiny.data)), "per_position", tiny.score))
    # Not to rounding: a sum that changes its sign by rounding opens or closes a ReLU.
    assert torch.cosine_similarity(weights(scorer) - start, weights(plain[0]) - start, dim=0) > 0.99
    assert scores.keys() == plain[1].keys()


def test_clipping_shortens_the_step(tiny: TrainConfig, plain: Any) -> None:
    start = weights(Scorer(model_for(tiny, load_task(tiny.data)), "per_position", tiny.score))
    clipped, _ = two_steps(replace(tiny, optimizer=replace(tiny.optimizer, clip=1e-3, weight_decay=0.0)), **FLOAT32)
    assert 0 < (weights(clipped) - start).norm() < 0.1 * (weights(plain[0]) - start).norm()


def test_compiled_encoder_trains_the_same_weights(
    tiny: TrainConfig, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced by Dynamo and differentiated ahead of time as always; only the code generator is left out, for speed.
    compiled: list[Any] = []
    original = torch.compile

    def compile_eagerly(what: Any) -> Any:
        compiled.append(what)
        return original(what, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    compiler_obstacle.cache_clear()
    scorer, scores = two_steps(tiny, **FLOAT32, compile=True)
    assert compiled == [torch.neg, scorer.model]  # a trial, then the encoder
    torch.testing.assert_close(weights(scorer), weights(plain[0]), rtol=1e-3, atol=1e-4)
    assert scores.keys() == plain[1].keys()


def test_what_cannot_be_compiled_says_so_and_runs(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(execution, "compiler_obstacle", lambda _: None)
    asked = replace(tiny, run=replace(tiny.run, compile=True))
    assert settled(tiny, cpu).run.compile is False
    assert settled(asked, cpu).run.compile is True
    assert not [one for one in recwarn if "run.compile" in str(one.message)]
    for changes, reason in (({"micro_batch": 4}, "micro-batches"), ({"accumulate": 2}, "parts of a batch")):
        in_parts = replace(asked, optimizer=replace(tiny.optimizer, **changes))
        with pytest.warns(RuntimeWarning, match=f"stage 1 runs uncompiled: {reason}"):
            assert settled(in_parts, cpu).run.compile is False
    monkeypatch.undo()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    compiler_obstacle.cache_clear()
    torch.compiler.reset()
    with pytest.warns(RuntimeWarning, match=r"stage 1 runs uncompiled: .*No working C\+\+ compiler"):
        assert settled(asked, cpu).run.compile is False
    compiler_obstacle.cache_clear()


def test_auto_is_bf16_only_where_the_processor_multiplies_it(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    for capabilities, expected in (
        ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "float32"), ({}, "float32"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        multiplies_bf16.cache_clear()
        run = settled(tiny, device).run
        assert (run.precision, run.memory_format) == (expected, "channels_last")
        assert settled(settled(tiny, device), device) == settled(tiny, device)
    multiplies_bf16.cache_clear()
    asked = replace(tiny, run=replace(tiny.run, **FLOAT32, compile=False))
    assert settled(asked, device) == asked


def test_bf16_where_there_is_none_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"`run\.precision`: bf16 runs on cpu and cuda, received the device mps"):
        settled(replace(tiny, run=replace(tiny.run, precision="bf16")), torch.device("mps"))


def test_a_run_keeps_what_auto_chose(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception):
        """Ends the training before it begins."""

    def stop(*_: Any) -> None:
        raise Made

    monkeypatch.setattr("anomem.train.run._complete", stop)
    with pytest.raises(Made):
        train(tiny, quiet=True)
    _, config = RunDirectory.open(Path(str(tiny.run.directory)))
    assert config == settled(tiny, torch.device("cpu"))
    assert "auto" not in (config.run.precision, config.run.memory_format, config.run.compile)


def test_the_average_replaces_the_weights(tiny: TrainConfig) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    average = Average([("weight", weight)], 0.5)
    means = []
    for step in range(4):
        with torch.no_grad():
            weight += 1
        average.begin(step)
        average.update()
        means.append(float(average.pairs[0][2][0]))
    # Decays 1/10, 2/11, 3/12, 4/13 of the first steps, all below 0.5.
    expected = 0.0
    for step, found in enumerate(means):
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * (step + 1)
        assert found == pytest.approx(expected)
    average.finish()
    assert float(weight.detach()[0]) == pytest.approx(expected)
    scorer, _ = two_steps(replace(tiny, optimizer=replace(tiny.optimizer, ema=0.9)), **FLOAT32)
    whole, _ = two_steps(tiny, **FLOAT32)
    start = weights(Scorer(model_for(tiny, load_task(tiny.data)), "per_position", tiny.score))
    assert 0 < (weights(scorer) - start).norm() < (weights(whole) - start).norm()


def test_an_averaged_run_resumes_with_the_same_bits(tiny: TrainConfig, tmp_path: Path) -> None:
    optimizer = replace(tiny.optimizer, ema=0.9, accumulate=2, micro_batch=5)
    settings = replace(tiny, optimizer=optimizer, run=replace(tiny.run, checkpoint_every=3))
    broken = RunDirectory(tmp_path / "broken")
    for folder in (tmp_path / "whole", broken.path):
        (folder / "checkpoints").mkdir(parents=True)
    model, images = model_for(settings, load_task(settings.data)), load_task(settings.data).train
    train_stage1(model, images, None, settings, RunDirectory(tmp_path / "whole"), quiet=True)

    class Stop(Exception):
        """In place of a power cut."""

    original = stage1.set_rates

    def set_rates(optimizer: Any, average: Any, config: Any, step: int) -> None:
        if step == 4:
            raise Stop
        original(optimizer, average, config, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "set_rates", set_rates)
        with pytest.raises(Stop):
            train_stage1(model_for(settings, load_task(settings.data)), images, None, settings, broken, quiet=True)
    resumed = model_for(settings, load_task(settings.data))
    train_stage1(resumed, images, None, settings, broken, quiet=True)
    assert load_checkpoint(broken.checkpoints, "stage1") is not None
    for (name, expected), actual in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name


FAULTS = """
import resource, torch
from anomem.train.execution import keep_freed_memory
keep_freed_memory()
def fill():
    torch.empty(5 << 23, dtype=torch.uint8).fill_(1)
for _ in range(3):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Page faults of three tensors of 40 MiB, in the memory that those before them have freed."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep their own rules")
def test_freed_memory_is_used_again_whatever_its_size() -> None:
    found = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 1000  # of 10,240 pages each
