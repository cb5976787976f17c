"""The contrast over the rows of several processes: under DDP, the loss and the gradients of the joint batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from anomem import nn as ann
from anomem.testing import draw

PROCESSES = 2


def views(groups: int) -> Tensor:
    shape = (2, PROCESSES, groups, 3, 8) if groups else (2, PROCESSES, 3, 8)
    return draw(*shape).double()  # [view, process, (G,) B, d]


def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        [nn.Linear(8, 4), ann.NTXentLoss(0.3, learn_temperature=True, gather_distributed=True)]
    ).double()


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        encoder, criterion = self.layers
        loss: Tensor = criterion(encoder(z0), encoder(z1))
        return loss


def one_process(rank: int, folder: str) -> None:
    """What each of the processes does: a step under DDP, whose loss and gradients rank 0 leaves in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    for groups in (0, 2):
        step = nn.parallel.DistributedDataParallel(Step())
        loss = step(*views(groups)[:, rank])
        loss.backward()
        dist.all_reduce(loss.detach())
        if rank == 0:
            gradients = [parameter.grad for parameter in step.parameters()]
            torch.save([loss.detach() / PROCESSES, *gradients], f"{folder}/{groups}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_it_is_the_loss_of_the_joint_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=PROCESSES)
    for groups in (0, 2):
        step = Step()  # in this one process nothing is gathered
        joint = [view.movedim(0, -3).flatten(-3, -2) for view in views(groups)]  # [(G,) W·B, d]
        loss = step(*joint)
        expected = [loss.detach(), *torch.autograd.grad(loss, list(step.parameters()))]
        for mine, theirs in zip(torch.load(tmp_path / f"{groups}"), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
