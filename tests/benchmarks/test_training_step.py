"""The step that is profiled is the step that is trained."""

from __future__ import annotations

import torch

from anomem.models import ModelConfig, build_model
from anomem.testing import assert_within_budget
from anomem.train.config import LossConfig
from anomem.train.objective import draw_positions, multi_scale_loss, scale_criterion
from benchmarks.training.phases import Phases
from benchmarks.training.pipelines import Batched, PerImage, TwoViews, random_images
from benchmarks.training.step import Step


def test_loss_is_the_training_loop_s() -> None:
    model = build_model(ModelConfig(impl="reference"), (16, 16), 3, (0.5,) * 3, (0.25,) * 3).train()
    views = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    step = Step(model, "cpu", bf16=False, loss_in_float32=False)
    positions = draw_positions(model.encoder.sizes, LossConfig(), 6, torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        sampled = model.sample(model(views.to(dtype)), positions)
        results.append(multi_scale_loss(model, scale_criterion(LossConfig(), "reference"), sampled, None)[0])
    model.float()
    profiled = step.loss(views, Phases("cpu", timed=False))
    assert_within_budget(profiled.detach(), results[0].detach(), results[1].detach())


def test_a_step_changes_the_model_and_times_every_phase() -> None:
    model = build_model(ModelConfig(impl="reference"), (16, 16), 3, (0.5,) * 3, (0.25,) * 3).train()
    before = [p.detach().clone() for p in model.parameters()]
    step, phases = Step(model, "cpu", bf16=False, loss_in_float32=True), Phases("cpu", timed=True)
    source = Batched(random_images(16, 16), 6, "cpu").views(phases)
    step(next(source), phases)
    phases.end_of_block(1)
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert list(phases.milliseconds()) == [
        "data", "augmentation", "encoder forward", "gather", "retrieval", "contrastive", "backward", "optimizer",
    ]  # fmt: skip


def test_both_pipelines_give_views_of_the_same_kind() -> None:
    images, phases = random_images(16, 16), Phases("cpu", timed=False)
    for source in (Batched(images, 6, "cpu"), PerImage(images, 6, "cpu", workers=0)):
        for views, _ in zip(source.views(phases), range(4), strict=False):  # more than an epoch
            assert views.shape == (12, 3, 16, 16)
            assert views.dtype == torch.float32
            assert 0 <= views.min() <= views.max() <= 1
    first, second = TwoViews(images)[0]
    assert not torch.equal(first, second)
