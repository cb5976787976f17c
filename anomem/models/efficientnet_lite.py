"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excite, ReLU6) for inference, as a chain of named stages.

There are no batch norms: the checkpoint's are folded into the convolutions before them. Nothing is left that training
mode could move, and a forward pass reads and writes less.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = 127 / 255, 128 / 255
"""Of the inputs the published weights were trained with, in [0, 1], the same for every channel."""
GROUPS = (
    # kernel, stride of the first block, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
EPSILON = 1e-3
"""Of the checkpoint's batch norms."""


class SameConv2d(nn.Conv2d):
    """A convolution whose output has ceil(H / stride) rows: TensorFlow's SAME padding, larger at the end.

    Shape:
        [B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)].
    """

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        vertical, horizontal = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        )
        if vertical % 2 == 0 and horizontal % 2 == 0:
            padding = (vertical // 2, horizontal // 2)
            return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)
        x = F.pad(x, (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where the shape is kept.

    Args:
        channels: C.
        out_channels: C'.
        kernel: side of the depthwise filter.
        stride: of the depthwise filter.
        expansion: width of the inside, in units of C; 1 leaves the first convolution out.

    Shape:
        [B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = channels * expansion
        self.expand = nn.Sequential() if expansion == 1 else convolution(channels, inside, 1)
        self.depthwise = convolution(inside, inside, kernel, stride, groups=inside)
        self.project = SameConv2d(inside, out_channels, 1)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def convolution(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and ReLU6."""
    layer = SameConv2d(channels, out_channels, kernel, stride, groups=groups)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(layer, nn.ReLU6(inplace=True))


def efficientnet_lite0_stages(channels: int = 3) -> dict[str, nn.Module]:
    """The network without its classifier: "stem", then "block0" to "block15", with fresh weights.

    Args:
        channels: of the images.

    Returns:
        Name -> stage. The maps are 1/2 of the image's size from the stem on, 1/4 from block1, 1/8 from block3, 1/16
        from block5 and 1/32 from block11.
    """
    stages: dict[str, nn.Module] = {"stem": convolution(channels, 32, 3, 2)}
    width = 32
    for kernel, first_stride, expansion, out_channels, blocks in GROUPS:
        for i in range(blocks):
            stride = first_stride if i == 0 else 1
            stages[f"block{len(stages) - 1}"] = InvertedResidual(width, out_channels, kernel, stride, expansion)
            width = out_channels
    return stages


def folded_checkpoint(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint with its batch norms folded, for `nn.ModuleDict(efficientnet_lite0_stages())`.

    Args:
        checkpoint: as published: `_conv_stem.weight`, `_bn0.…`, `_blocks.4._expand_conv.weight`, `_blocks.4._bn0.…`.

    Returns:
        `stem.0.weight`, `stem.0.bias`, `block4.expand.0.weight` and so on; the classifier is left out.

    Raises:
        KeyError: a tensor is missing.
    """
    layers = {"stem.0": ("_conv_stem", "_bn0")}
    expansions = [expansion for *_, expansion, _, blocks in GROUPS for _ in range(blocks)]
    for i, expansion in enumerate(expansions):
        old = f"_blocks.{i}."
        if expansion > 1:
            layers[f"block{i}.expand.0"] = (f"{old}_expand_conv", f"{old}_bn0")
        layers[f"block{i}.depthwise.0"] = (f"{old}_depthwise_conv", f"{old}_bn1")
        layers[f"block{i}.project"] = (f"{old}_project_conv", f"{old}_bn2")
    tensors = {}
    for name, (convolution_name, norm) in layers.items():
        weight, bias = fold(checkpoint, convolution_name, norm)
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = weight, bias
    return tensors


def fold(checkpoint: Mapping[str, Tensor], convolution_name: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight [C', C, k, k] and bias [C'] of a convolution with the batch norm after it."""
    factor = checkpoint[f"{norm}.weight"].double() / (checkpoint[f"{norm}.running_var"].double() + EPSILON).sqrt()
    weight = checkpoint[f"{convolution_name}.weight"].double() * factor[:, None, None, None]
    bias = checkpoint[f"{norm}.bias"].double() - checkpoint[f"{norm}.running_mean"].double() * factor
    return weight.float(), bias.float()


def classifier(checkpoint: Mapping[str, Tensor]) -> nn.Sequential:
    """The published head: block15's map [B, 320, h, w] -> logits [B, 1000]. It shows that weights and inputs are right.

    Args:
        checkpoint: as published.
    """
    head = nn.Sequential(convolution(320, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))
    weight, bias = fold(checkpoint, "_conv_head", "_bn1")
    head.load_state_dict(
        {
            "0.0.weight": weight,
            "0.0.bias": bias,
            "3.weight": checkpoint["_fc.weight"],
            "3.bias": checkpoint["_fc.bias"],
        }
    )
    return head
