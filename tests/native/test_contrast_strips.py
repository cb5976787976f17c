"""NT-Xent of so many rows that the native kernel works on strips of them (csrc/cpu/contrast.h, strip_rows)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anomem.functional import nt_xent
from anomem.reference.retrieve import l2_normalize
from anomem.testing import draw
from tests.operators.contract import BF16, F32, F64
from tests.operators.contrast_calls import OPERATORS

LEAST = 8192
"""Pairs from which on two groups are cut into strips."""


def losses_and_gradients(z: Tensor, z_pair: Tensor, tau: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [G, 2B] and the gradient of all rows [G, 2B, d] of the native kernel."""
    leaves = [z.detach().requires_grad_(), z_pair.detach().requires_grad_()]
    losses = nt_xent(*leaves, temperature=tau, reduction="none", impl="native")
    return losses.detach(), torch.cat(torch.autograd.grad(losses, leaves, upstream), dim=-2)


def exact(
    z: Tensor, z_pair: Tensor, tau: float, upstream: Tensor, losses: Tensor, picked: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [G, n] and gradients [G, n, d] of the rows `picked` in float64, by the formulas of the reference.

    The log-sums of the rows that are not picked follow from `losses`, which is held to the exact ones where it is
    picked.
    """
    count = z.shape[-2]
    rows = torch.cat([z, z_pair], dim=-2).double()
    unit = l2_normalize(rows)
    matched = (unit * unit.roll(count, dims=-2)).sum(-1) / tau
    mine = unit[:, picked]
    logits = mine @ unit.mT / tau  # [G, n, 2B]
    itself = torch.zeros(len(picked), 2 * count, dtype=torch.bool)
    itself[torch.arange(len(picked)), picked] = True
    logits = logits.masked_fill(itself, -torch.inf)
    lse = losses.double() + matched
    found = torch.logsumexp(logits, dim=-1)
    slope = upstream.double()
    own = slope[:, picked, None] * (logits - found[..., None]).exp()
    others = slope[:, None] * (logits - lse[:, None]).exp()
    positive = (picked + count) % (2 * count)
    weights = own + others
    pull = slope[:, picked] + slope[:, positive]
    weights[:, torch.arange(len(picked)), positive] -= pull
    d_unit = weights @ unit / tau
    length = rows[:, picked].norm(dim=-1, keepdim=True)
    gradient = (d_unit - mine * (mine * d_unit).sum(-1, keepdim=True)) / length
    return found - matched[:, picked], gradient


@pytest.mark.parametrize(
    ("dtype", "tau", "groups", "batch", "d", "tolerance"),
    [
        (F32, 0.2, 2, LEAST, 16, 1e-5),
        (F32, 0.2, 2, LEAST + 37, 64, 1e-5),  # strips and tiles that are not full
        (F32, 0.01, 2, LEAST + 700, 5, 1e-4),  # with peaks
        (F32, 0.2, 1, 2 * LEAST + 1, 8, 1e-5),
        (BF16, 0.2, 2, LEAST + 65, 16, 1e-2),
        (F64, 0.1, 2, LEAST + 64, 3, 1e-11),
    ],
)
def test_losses_and_gradients_of_many_rows(
    dtype: torch.dtype, tau: float, groups: int, batch: int, d: int, tolerance: float
) -> None:
    z, noise = (draw(groups, batch, d, dtype=dtype, seed=seed) for seed in (1, 2))
    z_pair = (z + noise).to(dtype)
    upstream = draw(groups, 2 * batch, dtype=F64 if dtype == F64 else F32, seed=3)
    losses, gradients = losses_and_gradients(z, z_pair, tau, upstream)
    # Of the first, the last and some strips between.
    picked = torch.cat([torch.arange(3), torch.arange(97, 2 * batch, 1111), torch.arange(2 * batch - 2, 2 * batch)])
    expected, slopes = exact(z, z_pair, tau, upstream, losses, picked)
    torch.testing.assert_close(losses[:, picked].double(), expected, rtol=max(tolerance / 10, 1e-6), atol=1e-6)
    error = (gradients[:, picked].double() - slopes).norm() / slopes.norm()
    assert error < tolerance


def test_threads_change_nothing() -> None:
    z, z_pair = (draw(2, LEAST + 200, 8, seed=seed) for seed in (1, 2))
    upstream = draw(2, 2 * LEAST + 400, seed=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(losses_and_gradients(z, z_pair, 0.2, upstream))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_learned_temperature_of_many_rows() -> None:
    z, z_pair = (draw(2, LEAST, 4, seed=seed) for seed in (1, 2))

    def mean(tau: Tensor) -> Tensor:
        return nt_xent(z, z_pair, temperature=tau, impl="native")

    tau = torch.tensor(0.3, requires_grad=True)
    (slope,) = torch.autograd.grad(mean(tau), tau)
    step = 1e-2
    apart = mean(torch.tensor(0.3 + step)) - mean(torch.tensor(0.3 - step))
    torch.testing.assert_close(slope, apart / (2 * step), rtol=2e-3, atol=0)


def test_the_workspace_is_the_sums_of_the_gradient(one_thread: None) -> None:
    """And a pair of packed strips for each thread: no packed copy of all rows."""
    z, z_pair = (draw(1, 2 * LEAST, 64, seed=seed) for seed in (1, 2))
    peak = torch.ops.anomem.native_scratch_peak
    rows, strips, tile_buffers = 4 * LEAST, 2 * 512, 1 << 17
    peak(z)
    loss, total, inverse = OPERATORS.native_nt_xent_fwd(z, z_pair, None, 0.2)
    assert peak(z) < 4 * (rows * 2 + strips * (2 * 64 + 1)) + tile_buffers
    OPERATORS.native_nt_xent_bwd(torch.ones_like(loss), z, z_pair, loss, total, inverse, None, 0.2)
    assert peak(z) < 4 * (rows * (64 + 2) + strips * (2 * 64 + 1)) + tile_buffers
