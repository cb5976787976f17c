"""Losses across processes: on 2, 3 and 4 that talk by gloo, each loss and every gradient is the joint batch's."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from anomem import functional as AF
from anomem import nn as ann
from anomem.errors import ArgumentError
from anomem.testing import draw
from tests.functional import jobs
from tests.processes import in_processes

ONCE = [
    "rows_are_those_of_one_process",
    "half_precision_and_far_means_keep_the_budget",
    "gathering_is_twice_differentiable",
    "groups_meshes_and_mistakes",
    "messages_have_the_size_that_the_documentation_says",
    "batch_norm_is_that_of_the_joint_batch",
    "two_batch_norms_share_their_messages",
]
IN_TWO = ["the_compiler_traces_a_loss"]  # its import takes seconds in every process
IN_TWO += ["rows_agree_with_lightly"] if importlib.util.find_spec("lightly") else []


@pytest.mark.parametrize(("count", "more"), [(2, IN_TWO), (3, ONCE), (4, ["rows_are_those_of_one_process"])])
def test_processes_are_one(count: int, more: list[str]) -> None:
    in_processes(count, jobs.check, ["gradients_are_those_of_one_process", *more])


def test_without_processes_it_is_the_plain_loss() -> None:
    z, z_pair = draw(5, 8), draw(5, 8, seed=1)
    assert AF.gather_rows(z) is z
    assert AF.rows_per_process(5) == (5,)
    assert torch.equal(AF.nt_xent_distributed(z, z_pair), AF.nt_xent(z, z_pair))
    assert torch.equal(AF.variance_hinge_distributed(z), AF.variance_hinge(z))
    assert torch.equal(AF.info_nce_distributed(z, z_pair), AF.info_nce(z, z_pair, torch.arange(5)))
    for criterion in (ann.NTXentLoss, ann.InfoNCELoss):
        assert torch.equal(criterion(0.3, gather_distributed=True)(z, z_pair), criterion(0.3)(z, z_pair))


def test_what_has_no_rows_is_told() -> None:
    with pytest.raises(ArgumentError, match=r"`rows`: expected a tensor \[\.\.\., B, d\]"):
        AF.gather_rows(torch.zeros(3))


def test_a_loss_over_processes_has_its_own_columns() -> None:
    z, z_pair = draw(5, 8), draw(5, 8, seed=1)
    with pytest.raises(ArgumentError, match="`positive`: expected None with gather_distributed"):
        ann.InfoNCELoss(gather_distributed=True)(z, z_pair, torch.arange(5))
