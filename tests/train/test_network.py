"""Batch norms that are converted for several processes; what the processes compute together is in test_ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from anomem.nn import BatchNorm2d
from anomem.nn.batch_norm import JointBatchNorm
from anomem.train.network import replace_batch_norms, separate, synchronised


def small_network() -> nn.Sequential:
    return nn.Sequential(BatchNorm2d(3, relu=True), nn.Sequential(nn.BatchNorm2d(3, momentum=None)), BatchNorm2d(3))


def calls(layers: nn.Sequential, x: torch.Tensor, add: torch.Tensor) -> list[torch.Tensor]:
    """Results in training and in eval mode, and the state."""
    outputs = [layers.train()(x), layers[2](x, add), layers.eval()(x), layers[2](x, add)]
    return [*outputs, *layers.state_dict().values()]


@pytest.mark.parametrize(("by", "kind"), [(JointBatchNorm, JointBatchNorm), (synchronised, nn.SyncBatchNorm)])
def test_converted_batch_norms_compute_the_same_in_one_process(by: Any, kind: type[nn.Module]) -> None:
    """torch's synchronised batch norm is that of GPUs; alone it computes on a CPU too."""
    torch.manual_seed(0)
    x, add = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    plain, other = small_network(), replace_batch_norms(small_network(), by)
    assert all(isinstance(layer, kind) for layer in (other[0], other[1][0], other[2]))
    assert list(other.state_dict()) == list(plain.state_dict())
    for mine, theirs in zip(calls(other, x, add), calls(plain, x, add), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_hook_of_a_separate_batch_norm_stays() -> None:
    x, norm = torch.randn(4, 3, 5, 5), nn.SyncBatchNorm(3)
    norm.register_forward_hook(lambda *given: 2 * given[-1])
    torch.testing.assert_close(separate(norm)(x), 2 * nn.functional.batch_norm(x, None, None, training=True))
