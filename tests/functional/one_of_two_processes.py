"""What each of two processes does in `test_distributed.py`: `python one_of_two_processes.py RANK STORE CHECK…`."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anomem import functional as AF
from anomem import nn as ann
from anomem.testing import assert_within_budget, draw

RANK, STORE = int(sys.argv[1]), sys.argv[2]
BATCH, FEATURES, PROCESSES = 6, 16, 2


def own_rows(everyone: Tensor) -> Tensor:
    """This process's share of a batch [..., W·B, d]."""
    return everyone.chunk(PROCESSES, dim=-2)[RANK].clone()


def mine_of_losses(everyone: Tensor) -> Tensor:
    """This process's share of the losses [..., 2WB] of both views."""
    return torch.cat([half.chunk(PROCESSES, dim=-1)[RANK] for half in everyone.chunk(2, dim=-1)], dim=-1)


def rows_are_those_of_one_process() -> None:
    """Row by row; with groups; in the implementations that run here."""
    for shape in ((PROCESSES * BATCH, FEATURES), (3, PROCESSES * BATCH, FEATURES)):
        z, z_pair = (draw(*shape, seed=seed) for seed in (1, 2))
        plain, exact = (
            AF.nt_xent(z.to(dtype), z_pair.to(dtype), temperature=0.1, reduction="none", impl="reference")
            for dtype in (torch.float32, torch.float64)
        )
        for impl in ("reference", "native", "auto"):
            rows = AF.nt_xent_distributed(own_rows(z), own_rows(z_pair), temperature=0.1, reduction="none", impl=impl)
            expected = [
                torch.cat([own_rows(half[..., None])[..., 0] for half in x.chunk(2, -1)], -1) for x in (plain, exact)
            ]
            assert_within_budget(rows, *expected)


def gradients_under_ddp_are_those_of_one_process() -> None:
    """Of an encoder's weights and of a learned temperature, in float64."""
    z, z_pair = (draw(PROCESSES * BATCH, 8, seed=seed).double() for seed in (3, 4))

    def parts() -> tuple[nn.Module, ann.NTXentLoss]:
        torch.manual_seed(0)
        criterion = ann.NTXentLoss(0.2, gather_distributed=True, learn_temperature=True)
        return nn.Linear(8, FEATURES).double(), criterion.double()

    encoder, criterion = (DistributedDataParallel(part) for part in parts())
    loss = criterion(encoder(own_rows(z)), encoder(own_rows(z_pair)))
    loss.backward()
    dist.all_reduce(loss.data)

    alone, plain = parts()
    plain.gather_distributed = False
    expected = plain(alone(z), alone(z_pair))
    expected.backward()
    torch.testing.assert_close(loss.data / PROCESSES, expected.data)
    shared, whole = ([*a.parameters(), *b.parameters()] for a, b in ((encoder, criterion), (alone, plain)))
    assert len(whole) == 3
    for one, other in zip(shared, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def gathering_is_twice_differentiable() -> None:
    """Σ of cubes over all processes: the second derivative of one's rows is 6 W x."""
    x = own_rows(draw(PROCESSES * 3, 4).double()).requires_grad_()
    gathered = AF.gather_rows(x)
    assert gathered.shape == (PROCESSES * 3, 4)
    torch.testing.assert_close(own_rows(gathered.detach()), x.detach())
    (first,) = torch.autograd.grad(gathered.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * PROCESSES * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * PROCESSES * x.detach())


def rows_agree_with_lightly() -> None:
    """Loss and what reaches the views."""
    from lightly.loss import NTXentLoss

    views = [own_rows(draw(PROCESSES * BATCH, FEATURES, seed=seed).double()) for seed in (5, 6)]
    results = []
    for criterion in (NTXentLoss(0.5, gather_distributed=True), ann.NTXentLoss(0.5, gather_distributed=True)):
        leaves = [view.clone().requires_grad_() for view in views]
        loss = criterion(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=PROCESSES)
for check in sys.argv[3:]:
    globals()[check]()
dist.barrier()
print("all right", flush=True)
os._exit(0)  # not by way of Python's end, where a thread of gloo that still runs aborts the process now and then
