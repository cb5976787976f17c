"""The 3×3 convolution as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from anomem.functional.conv3x3 import conv3x3
from anomem.rules import IMPLEMENTATIONS, Impl
from anomem.validation import require_choice


class Conv3x3(nn.Conv2d):
    """`torch.nn.Conv2d` of 3×3 taps, stride 1 and padding 1, without bias, by `anomem.functional.conv3x3`.

    The parameter, its name and its initial values are those of torch's; state dicts fit both. On CPUs the kernel takes
    channels-last maps.

    Args:
        in_channels: C.
        out_channels: C'.
        impl: "auto", "reference" or "native", a preference; see `anomem.backends`.

    Shape:
        [B, C, H, W] -> [B, C', H, W].

    Raises:
        ArgumentError: an unknown implementation; in the call as `anomem.functional.conv3x3`.

    Example:
        >>> layer = Conv3x3(32, 64)
        >>> layer(torch.randn(8, 32, 7, 6).to(memory_format=torch.channels_last)).shape
        torch.Size([8, 64, 7, 6])
    """

    def __init__(self, in_channels: int, out_channels: int, *, impl: Impl = "auto") -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        require_choice(impl, "impl", IMPLEMENTATIONS)
        self.impl = impl

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of a map."""
        return conv3x3(input, self.weight, impl=self.impl, part=True)


def replace_convolutions(module: nn.Module, impl: Impl = "auto") -> nn.Module:
    """Make a `Conv3x3` of every `torch.nn.Conv2d` within a module that computes the same, in place.

    Layers, parameters, hooks and names stay. A convolution with another size, stride, padding, dilation, grouping or
    with a bias stays as it is, and so does one of a subclass.

    Args:
        module: any.
        impl: of the new layers.

    Returns:
        The module itself.

    Raises:
        ArgumentError: an unknown implementation.

    Example:
        >>> network = replace_convolutions(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False)))
        >>> network[0]
        Conv3x3(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    require_choice(impl, "impl", IMPLEMENTATIONS)
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _computes_the_same(layer):
            layer.__class__ = Conv3x3
            layer.impl = impl  # type: ignore[assignment]
    return module


def _computes_the_same(layer: nn.Conv2d) -> bool:
    size = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
    return size == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and layer.bias is None and layer.padding_mode == "zeros"
