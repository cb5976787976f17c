"""The 3×3 convolution as a layer."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from anomem.functional.conv3x3 import conv3x3
from anomem.nn.batch_norm import has_hooks
from anomem.rules import IMPLEMENTATIONS, Impl
from anomem.validation import require, require_choice, require_count


class Conv3x3(nn.Conv2d):
    """`torch.nn.Conv2d` of 3×3 taps, stride 1 and padding 1, without bias, by `anomem.functional.conv3x3`.

    The parameter, its name and its initial values are those of torch's; state dicts fit both. On CPUs the kernel takes
    channels-last maps.

    Args:
        in_channels: C.
        out_channels: C'.
        impl: "auto", "reference" or "native", a preference; see `anomem.backends`.
        device: of the weight.
        dtype: of the weight.

    Shape:
        [B, C, H, W] -> [B, C', H, W].

    Raises:
        ArgumentError: no channels, or an unknown implementation; in the call as `anomem.functional.conv3x3`.

    Example:
        >>> layer = Conv3x3(32, 64)
        >>> layer(torch.randn(8, 32, 7, 6).to(memory_format=torch.channels_last)).shape
        torch.Size([8, 64, 7, 6])
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, impl: Impl = "auto", device: Any = None, dtype: Any = None
    ) -> None:
        require_count(in_channels, "in_channels", 1)
        require_count(out_channels, "out_channels", 1)
        require_choice(impl, "impl", IMPLEMENTATIONS)
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.impl = impl

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of a map, torch's where the layer was given a bias or other options since it was made."""
        # A tracer of torch.fx gives a Proxy; torch's layer takes single images and complex numbers too.
        if not isinstance(input, Tensor) or input.dim() != 4 or input.dtype not in _REAL or not _is_plain(self, 3, 1):
            return super().forward(input)
        return conv3x3(input, self.weight, impl=self.impl, part=True)


_REAL = (torch.float32, torch.bfloat16, torch.float64)


def replace_convolutions(module: nn.Module, impl: Impl = "auto") -> nn.Module:
    """Make a `Conv3x3` of every `torch.nn.Conv2d` within a module that computes the same, in place.

    Layers, parameters, hooks and names stay. A convolution with another size, stride, padding, dilation, grouping or
    with a bias stays as it is, and so does one of a subclass or with a `forward` of its own.

    Args:
        module: any.
        impl: of the new layers.

    Returns:
        The module itself.

    Raises:
        ArgumentError: no module, or an unknown implementation.

    Example:
        >>> network = replace_convolutions(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False)))
        >>> network[0]
        Conv3x3(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    require(isinstance(module, nn.Module), "module", "a torch.nn.Module", lambda: type(module).__name__)
    require_choice(impl, "impl", IMPLEMENTATIONS)
    for layer in module.modules():
        known = type(layer) in (nn.Conv2d, Conv3x3)
        if known and isinstance(layer, nn.Conv2d) and _is_plain(layer, 3, 1) and not _differs(layer):
            layer.__class__ = Conv3x3
            layer.impl = impl  # type: ignore[assignment]
    return module


def is_bare(layer: nn.Module, side: int, stride: int) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution of torch's and its weight all that it has, without a hook.

    Args:
        layer: any.
        side: of its taps; the padding is half of it.
        stride: of its steps.
    """
    return type(layer) is nn.Conv2d and _is_plain(layer, side, stride) and not has_hooks(layer) and not _differs(layer)


def _is_plain(layer: nn.Conv2d, side: int, stride: int) -> bool:
    """Whether a convolution has these options and no bias."""
    options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    expected = ((side, side), (stride, stride), (side // 2, side // 2), (1, 1), 1, "zeros")
    return options == expected and layer.bias is None


def _differs(layer: nn.Conv2d) -> bool:
    """Whether an instance has its own `forward` or `_conv_forward`; torch.compile cannot ask."""
    return not torch.compiler.is_compiling() and not vars(layer).keys().isdisjoint(("forward", "_conv_forward"))
