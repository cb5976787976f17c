"""The adaptive margin, balanced batches, and the other view as positive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anomem import functional as AF
from anomem.data import ResidentImages, load_task
from anomem.train import TrainConfig, model_for, train_stage1, train_stage2
from anomem.train.batches import training_batches
from anomem.train.margin import HIGHEST, LOWEST, RATE, TARGET, AdaptiveMargin
from anomem.train.run import head_for, resume, train
from anomem.train.rundir import RunDirectory

NORMAL = torch.tensor([True, True, True, False])


def moved(lengths: list[float], margin: float = 2.0) -> float:
    """log M after a step minus log M before it, in units of the rate."""
    adaptive = AdaptiveMargin(margin)
    before = adaptive.value.log()
    adaptive.update([torch.tensor(lengths)], NORMAL, [1.0])
    return float((adaptive.value.log() - before) / RATE)


def test_the_margin_follows_the_violations_of_both_classes() -> None:
    assert moved([0.4, 0.1, 0.5, 2.0]) == pytest.approx(TARGET, abs=1e-5)  # none violates its radius
    assert moved([0.6, 0.1, 0.5, 2.0]) == pytest.approx(TARGET - 1 / 6, abs=1e-5)  # one of three normals
    assert moved([0.4, 0.1, 0.5, 1.9]) == pytest.approx(TARGET - 1 / 2, abs=1e-5)  # the only anomaly
    assert moved([9.0, 9.0, 9.0, 0.0]) == pytest.approx(TARGET - 1, abs=1e-5)


def test_scales_weigh_as_in_the_loss() -> None:
    adaptive = AdaptiveMargin(2.0)
    satisfied, violated = torch.tensor([0.1, 0.1, 0.1, 3.0]), torch.tensor([9.0, 9.0, 9.0, 0.0])
    adaptive.update([satisfied, violated], NORMAL, [3.0, 1.0])
    assert float((adaptive.value / 2).log() / RATE) == pytest.approx(TARGET - 0.25, abs=1e-5)


def test_the_margin_stays_where_the_loss_is_well_posed() -> None:
    for lengths, bound in (([0.0, 0.0, 0.0, 99.0], HIGHEST), ([9.0, 9.0, 9.0, 0.0], LOWEST)):
        adaptive = AdaptiveMargin(2.0)
        for _ in range(1000):
            adaptive.update([torch.tensor(lengths)], NORMAL, [1.0])
        assert float(adaptive.value) == pytest.approx(bound)


def test_descent_on_the_loss_itself_would_end_at_one() -> None:
    """Why M is not a parameter: its gradient is never negative."""
    margin = torch.tensor(2.0, requires_grad=True)
    loss = AF.margin_loss(torch.tensor([3.0, 0.7, 0.2, 1.0]), NORMAL, margin)
    (gradient,) = torch.autograd.grad(loss, margin)
    assert float(gradient) == pytest.approx((2 / 2**2 + 1) / 4)


def test_a_run_keeps_its_margin(tiny: TrainConfig) -> None:
    config = replace(tiny, stage2=replace(tiny.stage2, adaptive=True), run=replace(tiny.run, log_every=1))
    path = train(config, quiet=True)
    run, _ = RunDirectory.open(path)
    margins = [row["margin"] for row in run.rows() if row["stage"] == "stage2"]
    assert margins[0] == 2.0
    assert len(set(margins)) == len(margins), "M moves every step"
    assert (run.checkpoints / "stage2.json").exists()
    assert resume(path, quiet=True) == path


def test_balanced_batches_are_half_anomalies_and_resume_anywhere() -> None:
    images = ResidentImages(torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1))
    anomalous = torch.arange(11) >= 9  # two of eleven
    whole = [(step, index.tolist()) for step, _, index in training_batches(images, 6, 3, 0, 7, anomalous)]
    assert all(sum(i >= 9 for i in index) == 3 for _, index in whole)
    for epoch in range(2):  # three batches of three normals show each of the nine once
        seen = [i for _, index in whole[3 * epoch : 3 * epoch + 3] for i in index if i < 9]
        assert sorted(seen) == list(range(9))
    assert whole[0][1] != whole[3][1]
    for start in (1, 4):
        rest = [(step, index.tolist()) for step, _, index in training_batches(images, 6, 3, start, 7, anomalous)]
        assert rest == whole[start:]
    assert all(len(index) == 11 for _, _, index in training_batches(images, 64, 3, 0, 2, anomalous))


def test_stage2_draws_balanced_batches(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = replace(tiny.data, outlier_ratio=0.05)
    config = replace(tiny, data=data, synthetic_outliers=0.0, stage2=replace(tiny.stage2, balanced=True))
    task = load_task(config.data)
    model, shares = model_for(config, task), []
    head = head_for(config, model)
    lengths = head.lengths

    def noted(deviations: list[torch.Tensor]) -> list[torch.Tensor]:
        shares.append(len(deviations[0]))
        return lengths(deviations)

    drawn: list[int] = []
    batches = ResidentImages.batches

    def watched(self: ResidentImages, order: torch.Tensor, batch_size: int):  # type: ignore[no-untyped-def]
        drawn.extend(order.tolist())
        return batches(self, order, batch_size)

    monkeypatch.setattr(head, "lengths", noted)
    monkeypatch.setattr(ResidentImages, "batches", watched)
    train_stage2(model, head, task.train, task.train_is_normal, config, quiet=True)
    assert shares == [32] * 6
    assert sum(not task.train_is_normal[i] for i in drawn) == len(drawn) // 2 == 96


def test_the_other_view_as_positive_leaves_the_memories_alone(tiny: TrainConfig) -> None:
    config = replace(tiny, synthetic_outliers=0.0, prototypes_from="normal")
    task = load_task(config.data)
    by_view = replace(config, loss=replace(config.loss, positive="view"))
    for changed, moves in ((config, True), (by_view, False)):
        model = model_for(changed, task)
        before = [memory.prototypes.detach().clone() for memory in model.memories]
        weights = [p.detach().clone() for p in model.encoder.parameters()]
        train_stage1(model, task.train, None, changed, quiet=True)
        assert any(not torch.equal(a, b) for a, b in zip(weights, model.encoder.parameters(), strict=True))
        changes = [not torch.equal(a, m.prototypes) for a, m in zip(before, model.memories, strict=True)]
        assert changes == [moves] * len(before)
