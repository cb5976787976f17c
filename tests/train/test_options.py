"""Options of execution: each trains both stages, and says the same as the plain run where it must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from anomem.data import load_task
from anomem.scoring import Scorer, score_images
from anomem.train import TrainConfig, model_for, train_task


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


@pytest.fixture
def plain(tiny: TrainConfig) -> tuple[Scorer, dict[str, torch.Tensor]]:
    return two_steps(tiny)


def test_bf16_keeps_master_weights_in_float32(tiny: TrainConfig, plain: Any) -> None:
    scorer, scores = two_steps(tiny, bf16=True)
    assert all(p.dtype == torch.float32 for p in scorer.parameters())
    assert all(value.isfinite().all() for value in scores.values())
    start = weights(Scorer(model_for(tiny, load_task(tiny.data)), "per_position", tiny.score))
    moved, moved_bf16 = weights(plain[0]) - start, weights(scorer) - start
    assert not torch.equal(moved, moved_bf16)
    # The steps point the same way, in half the digits.
    assert torch.cosine_similarity(moved, moved_bf16, dim=0) > 0.9


def test_channels_last_trains_the_same_weights(tiny: TrainConfig, plain: Any) -> None:
    scorer, scores = two_steps(tiny, channels_last=True)
    convolution = next(p for p in scorer.model.encoder.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights(scorer), weights(plain[0]), rtol=1e-3, atol=1e-4)
    assert scores.keys() == plain[1].keys()


def test_clipping_shortens_the_step(tiny: TrainConfig, plain: Any) -> None:
    start = weights(Scorer(model_for(tiny, load_task(tiny.data)), "per_position", tiny.score))
    clipped, _ = two_steps(replace(tiny, optimizer=replace(tiny.optimizer, clip=1e-3, weight_decay=0.0)))
    assert 0 < (weights(clipped) - start).norm() < 0.1 * (weights(plain[0]) - start).norm()


def test_compiled_encoder_trains_the_same_weights(
    tiny: TrainConfig, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced by Dynamo and differentiated ahead of time as always; only the code generator is left out, for speed.
    compiled: list[torch.nn.Module] = []

    def compile_eagerly(module: torch.nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    scorer, scores = two_steps(tiny, compile=True)
    assert compiled == [scorer.model.encoder]
    torch.testing.assert_close(weights(scorer), weights(plain[0]), rtol=1e-3, atol=1e-4)
    assert scores.keys() == plain[1].keys()
