"""A few labels: they help, the one-class score stays in it, and one defect is enough to run."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from anomem.errors import ArgumentError, UserError
from anomem.evaluate.metrics import auroc
from anomem.scoring.labelled import FewLabels, pooled_deviations

pytest.importorskip("sklearn")


def images(count: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Pooled deviations [count, 12] and one-class scores [count]; each kind of defect shows in one of them."""
    source = torch.Generator().manual_seed(seed)
    pooled, one_class = torch.randn(count, 12, generator=source), torch.randn(count, generator=source)
    if kind == "labelled":
        pooled[:, 3] += 3
    elif kind == "other":
        one_class += 3
    return pooled, one_class


def fitted(defects: int) -> FewLabels:
    normal, defect = images(200, "normal", 0), images(defects, "labelled", 1)
    labels = FewLabels(12)
    is_normal = torch.arange(200 + defects) < 200
    labels.fit(torch.cat([normal[0], defect[0]]), torch.cat([normal[1], defect[1]]), is_normal)
    return labels


def area(labels: FewLabels, kind: str) -> float:
    normal, defect = images(300, "normal", 2), images(300, kind, 3)
    scores = torch.cat([labels(*normal), labels(*defect)])
    return auroc(scores, torch.arange(600) >= 300)


def test_labels_help_and_other_defects_are_still_seen() -> None:
    labels = fitted(20)
    assert area(labels, "labelled") > 0.9
    assert area(labels, "other") > 0.9
    assert area(labels, "normal") == pytest.approx(0.5, abs=0.1)


def test_one_defect_is_enough() -> None:
    labels = fitted(1)
    assert area(labels, "labelled") > 0.6
    assert area(labels, "other") > 0.9


def test_same_seed_same_scores_after_storing() -> None:
    before, after = fitted(10), FewLabels(12)
    after.load_state_dict(before.state_dict())
    new = images(50, "labelled", 5)
    assert torch.equal(after(*new), before(*new))
    assert torch.equal(fitted(10)(*new), before(*new))


def test_pooled_deviations_by_hand() -> None:
    deviations = [torch.tensor([[[1.0, -2.0], [3.0, 2.0]]]), torch.tensor([[[-4.0]]])]
    assert torch.equal(pooled_deviations(deviations), torch.tensor([[2.0, 0.0, 2.0, 2.0, -4.0, 4.0]]))


def test_constant_features_do_no_harm() -> None:
    pooled, one_class = images(40, "normal", 0)
    pooled[:, 5] = 1.0
    labels = FewLabels(12)
    labels.fit(pooled, one_class, torch.arange(40) < 35)
    assert bool(labels(pooled, one_class).isfinite().all())


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    pooled, one_class = images(10, "normal", 0)
    with pytest.raises(ArgumentError, match="at least one defect and two normals"):
        FewLabels(12).fit(pooled, one_class, torch.ones(10, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="strength"):
        FewLabels(12, 0)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match="scikit-learn"):
        FewLabels(12).fit(pooled, one_class, torch.arange(10) < 5)
