"""torch.export: with "auto" a program of plain PyTorch at any size, with a named implementation its operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from anomem import nn as ann
from anomem.backends import Impl
from anomem.ops import native
from anomem.testing import draw


class Step(nn.Module):
    def __init__(self, impl: Impl) -> None:
        super().__init__()
        self.memory = ann.HopfieldMemory(64, 64, impl=impl)
        self.criterion = ann.NTXentLoss(impl=impl)

    def forward(self, z: Tensor, z_pair: Tensor) -> Tensor:
        loss: Tensor = self.criterion(z, self.memory(z_pair))
        return loss


def exported(impl: Impl, strict: bool) -> tuple[Step, torch.export.ExportedProgram]:
    step = Step(impl).eval()
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = ({0: batch}, {0: batch})
    with torch.no_grad():
        return step, torch.export.export(step, (draw(6, 64), draw(6, 64)), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_auto_exports_plain_pytorch_of_every_size(strict: bool) -> None:
    """1500 queries lie beyond the size at which "auto" takes another implementation than at 6."""
    step, program = exported("auto", strict)
    assert "anomem" not in str(program.graph)
    for batch in (2, 1500):
        z, z_pair = draw(batch, 64, seed=1), draw(batch, 64, seed=2)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(z, z_pair), step(z, z_pair))


def test_a_named_implementation_is_kept() -> None:
    if (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    step, program = exported("native", strict=False)
    assert "anomem.native_nt_xent_fwd" in str(program.graph)
    z, z_pair = draw(9, 64, seed=1), draw(9, 64, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(z, z_pair), step(z, z_pair))
