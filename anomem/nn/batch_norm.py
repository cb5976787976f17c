"""Batch norm of maps with what follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from anomem.functional.batch_norm import batch_norm
from anomem.rules import IMPLEMENTATIONS, Impl
from anomem.validation import require_choice

if TYPE_CHECKING:
    from anomem.functional.distributed import Group


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, its ReLU and the sum of a residual branch in one operator.

    Parameters, buffers and their names are those of torch's; state dicts fit both. On CPUs the kernel takes
    channels-last maps.

    Args:
        num_features: C.
        eps: > 0, added to the variance.
        momentum: part of the batch in the new running statistics; None for the mean over all batches.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics.
        relu: max(0, ·) of the result.
        impl: "auto", "reference", "triton" or "native", a preference; see `anomem.backends`.

    Shape:
        [B, C, H, W] -> [B, C, H, W]; what is added has the same.

    Raises:
        ArgumentError: an unknown implementation; in the call as `anomem.functional.batch_norm`.

    Example:
        >>> norm = BatchNorm2d(16, relu=True)
        >>> norm(torch.randn(8, 16, 4, 4).to(memory_format=torch.channels_last)).min()
        tensor(0., grad_fn=<MinBackward1>)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        relu: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        require_choice(impl, "impl", IMPLEMENTATIONS)
        self.relu, self.impl = relu, impl

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        """The normalised map, plus `add`, through the ReLU where there is one."""
        self._check_input_dim(input)
        return normalised(self, input, add, self.relu, self.impl)

    def extra_repr(self) -> str:
        """Arguments of the constructor."""
        described: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return described + (", relu=True" if self.relu else "")


def normalised(
    norm: _NormBase,
    x: Tensor,
    add: Tensor | None = None,
    relu: bool = False,
    impl: Impl = "auto",
    process_group: Group | None = None,
) -> Tensor:
    """What a batch norm's mode, parameters and running statistics make of a map; counts the batch in training mode.

    Args:
        norm: torch's or one of its subclasses.
        x: [B, C, …].
        add: added to the result.
        relu: max(0, ·) of the result.
        impl: a preference.
        process_group: of `anomem.functional.batch_norm`.
    """
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    training = norm.training or norm.running_mean is None
    running = (norm.running_mean, norm.running_var) if not training or norm.track_running_stats else (None, None)
    return batch_norm(
        x, *running, norm.weight, norm.bias, training, momentum, norm.eps,
        add=add, relu=relu, process_group=process_group, impl=impl, part=True,
    )  # fmt: skip
