"""The convolution as a layer, and in the place of torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from anomem.errors import ArgumentError
from anomem.nn import Conv3x3, replace_convolutions
from anomem.ops import native
from anomem.testing import draw


def test_parameters_are_those_of_torchs() -> None:
    torch.manual_seed(0)
    mine = Conv3x3(3, 5)
    torch.manual_seed(0)
    theirs = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    theirs.load_state_dict(mine.state_dict())
    assert torch.equal(mine.weight, theirs.weight)
    x = draw(2, 3, 6, 5)
    torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_replaced_layers_keep_parameters_hooks_and_results(impl: str) -> None:
    if impl == "native" and (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    first, last = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False)
    network = nn.Sequential(first, nn.ReLU(), last)
    network.to(memory_format=torch.channels_last)
    x = draw(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    expected, parameters, calls = network(x), list(network.parameters()), []
    network[2].register_forward_hook(lambda *given: calls.append(1))
    assert replace_convolutions(network, impl) is network
    assert [type(layer) for layer in network] == [Conv3x3, nn.ReLU, Conv3x3]
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    torch.testing.assert_close(network(x), expected)
    assert calls == [1]
    torch.testing.assert_close(copy.deepcopy(network)(x), expected)


class Subclass(nn.Conv2d):
    """Its `forward` may do anything."""


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(4, 4, (3, 1), padding=1, bias=False),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv1d(4, 4, 3, padding=1, bias=False),
        nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False),
        Subclass(4, 4, 3, padding=1, bias=False),
    ],
    ids=str,
)
def test_other_convolutions_stay(layer: nn.Module) -> None:
    kind = type(layer)
    assert type(replace_convolutions(layer)) is kind


def test_parametrized_convolutions_stay() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    assert not isinstance(replace_convolutions(layer), Conv3x3)


def test_an_unknown_implementation_is_refused() -> None:
    for make in (lambda: Conv3x3(3, 3, impl="cuda"), lambda: replace_convolutions(nn.Identity(), "cuda")):
        with pytest.raises(ArgumentError, match=r"`impl`.*'cuda'"):
            make()
