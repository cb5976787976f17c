"""torchvision's ResNets with fewer passes over the maps: the same layers, parameters and results.

Each batch norm adds the shortcut and applies the ReLU that follow it, 3×3 convolutions of stride 1 are
`anomem.nn.Conv3x3`, and the two strided convolutions at the start of a basic block are one operator.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, Bottleneck

from anomem.models.encoders import Norm, strided_pair
from anomem.nn import replace_convolutions
from anomem.nn.batch_norm import sum_of_two
from anomem.rules import Impl


def resnet_stages(name: str, channels: int, small_stem: bool, norm: Norm, impl: Impl) -> list[nn.Module]:
    """Stem and four layers, with the classes, names and initial values of torchvision's.

    Args:
        name: "resnet18", "resnet50" or another of torchvision's.
        channels: C of the images.
        small_stem: a 3×3 convolution that keeps the resolution, in place of a 7×7 one and the pooling behind it.
        norm: makes the batch norms.
        impl: of the convolutions, a preference.
    """
    net = get_model(name, weights=None, norm_layer=norm)
    if small_stem:
        convolution = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        rest = []
    else:
        convolution = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        rest = [net.maxpool]
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own stem
    net.bn1.relu = True
    stem = nn.Sequential(convolution, net.bn1, nn.Identity(), *rest)  # torchvision's ReLU: keys of state dicts count it
    layers = [net.layer1, net.layer2, net.layer3, net.layer4]
    for layer in layers:
        for block in layer:
            _fuse(block, impl)
    return [stem, *layers]


def _fuse(block: BasicBlock | Bottleneck, impl: Impl) -> None:
    """Let a block of torchvision run as one of ours, in place."""
    replace_convolutions(block, impl)
    block.__class__ = _BasicBlock if isinstance(block, BasicBlock) else _Bottleneck
    for name, layer in block.named_children():
        if name.startswith("bn"):
            layer.relu = True
    block.impl = impl


class _BasicBlock(BasicBlock):  # type: ignore[misc]
    impl: Impl

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        if self.downsample is None:
            total: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), x)
            return total
        projection, norm = self.downsample
        inner, straight = strided_pair(x, self.conv1, projection, self.impl)
        return sum_of_two(self.bn2, self.conv2(self.bn1(inner)), norm, straight)


class _Bottleneck(Bottleneck):  # type: ignore[misc]
    impl: Impl

    def forward(self, x: Tensor) -> Tensor:
        """The same with three convolutions."""
        inner = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        if self.downsample is None:
            total: Tensor = self.bn3(inner, x)
            return total
        projection, norm = self.downsample
        return sum_of_two(self.bn3, inner, norm, projection(x))
