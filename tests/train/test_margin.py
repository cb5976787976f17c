"""The adaptive margin, and the other view as positive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anomem import functional as AF
from anomem.data import load_task
from anomem.train import TrainConfig, model_for, train_stage1
from anomem.train.margin import HIGHEST, LOWEST, RATE, TARGET, AdaptiveMargin
from anomem.train.run import resume, train
from anomem.train.rundir import RunDirectory

NORMAL = torch.tensor([True, True, True, False])


def moved(lengths: list[float], margin: float = 2.0) -> float:
    """log M after a step minus log M before it, in units of the rate."""
    adaptive = AdaptiveMargin(margin)
    before = adaptive.value.log()
    adaptive.update(adaptive.violations([torch.tensor(lengths)], NORMAL, [1.0]))
    return float((adaptive.value.log() - before) / RATE)


def test_the_margin_follows_the_violations_of_both_classes() -> None:
    assert moved([0.4, 0.1, 0.5, 2.0]) == pytest.approx(TARGET, abs=1e-5)  # none violates its radius
    assert moved([0.6, 0.1, 0.5, 2.0]) == pytest.approx(TARGET - 1 / 6, abs=1e-5)  # one of three normals
    assert moved([0.4, 0.1, 0.5, 1.9]) == pytest.approx(TARGET - 1 / 2, abs=1e-5)  # the only anomaly
    assert moved([9.0, 9.0, 9.0, 0.0]) == pytest.approx(TARGET - 1, abs=1e-5)


def test_scales_weigh_as_in_the_loss() -> None:
    adaptive = AdaptiveMargin(2.0)
    satisfied, violated = torch.tensor([0.1, 0.1, 0.1, 3.0]), torch.tensor([9.0, 9.0, 9.0, 0.0])
    adaptive.update(adaptive.violations([satisfied, violated], NORMAL, [3.0, 1.0]))
    assert float((adaptive.value / 2).log() / RATE) == pytest.approx(TARGET - 0.25, abs=1e-5)


def test_the_margin_stays_where_the_loss_is_well_posed() -> None:
    for lengths, bound in (([0.0, 0.0, 0.0, 99.0], HIGHEST), ([9.0, 9.0, 9.0, 0.0], LOWEST)):
        adaptive = AdaptiveMargin(2.0)
        for _ in range(1000):
            adaptive.update(adaptive.violations([torch.tensor(lengths)], NORMAL, [1.0]))
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


def test_parts_of_a_batch_move_the_margin_as_the_whole() -> None:
    lengths = torch.tensor([0.6, 0.1, 0.5, 1.9])
    adaptive = AdaptiveMargin(2.0)
    parts = [adaptive.violations([lengths[p]], NORMAL[p], [1.0]) for p in (slice(0, 1), slice(1, 4))]
    assert torch.equal(sum(parts), adaptive.violations([lengths], NORMAL, [1.0]))


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
