"""The convolution as a layer, and in the place of torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anomem.errors import ArgumentError
from anomem.models.encoders import ResidualBlock
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


def test_another_implementation_is_taken_over() -> None:
    layer = replace_convolutions(replace_convolutions(nn.Conv2d(4, 4, 3, padding=1, bias=False), "native"), "reference")
    assert layer.impl == "reference"


def test_options_that_change_later_hold() -> None:
    """As where a batch norm is folded into the convolution, or a stride is traded for a dilation."""
    norm = nn.BatchNorm2d(8).eval()
    nn.init.constant_(norm.bias, 1.0)
    layer, x = Conv3x3(4, 8), draw(2, 4, 7, 6)
    expected = norm(layer(x))
    torch.testing.assert_close(fuse_conv_bn_eval(layer.eval(), norm)(x), expected, rtol=1e-5, atol=1e-5)
    layer.dilation = layer.padding = (2, 2)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=2, dilation=2))
    layer.stride = (2, 2)
    assert layer(x).shape == (2, 8, 4, 3)


def test_what_torchs_layer_takes_is_taken() -> None:
    for dtype, shape in ((torch.float32, (3, 8, 8)), (torch.complex64, (2, 3, 8, 8))):
        layer, x = Conv3x3(3, 4, dtype=dtype), torch.ones(shape, dtype=dtype)
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_layers_compile_in_one_graph(impl: str) -> None:
    if impl == "native" and (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    network = nn.Sequential(Conv3x3(3, 4, impl=impl), ResidualBlock(4, 5, impl=impl))
    x = draw(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = torch.autograd.grad(network(x).sum(), network[0].weight)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), network[0].weight), expected, rtol=1e-4, atol=1e-5
    )


def test_replaced_networks_are_traced_by_fx() -> None:
    network = replace_convolutions(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU()))
    x = draw(2, 3, 6, 6)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


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


def test_convolutions_with_a_method_of_their_own_stay() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    layer._conv_forward = lambda input, weight, bias: F.conv2d(F.pad(input, (1, 1, 1, 1), "circular"), weight, bias)
    assert type(replace_convolutions(layer)) is nn.Conv2d


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv3x3(3, 3, impl="cuda"), "`impl`.*'cuda'"),
        (lambda: replace_convolutions(nn.Identity(), "cuda"), "`impl`.*'cuda'"),
        (lambda: replace_convolutions([nn.Identity()]), "`module`.*list"),
        (lambda: Conv3x3(0, 3), "`in_channels`.*0"),
        (lambda: Conv3x3(3, "4"), "`out_channels`.*4"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
