"""Double backward: the gradient of a gradient comes from the reference, which PyTorch can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wants_graph() -> bool:
    """Whether the running backward pass must itself be differentiable (`create_graph=True`).

    A compiled backward never is, so there the kernels always run.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that carry a graph of their own.

    Args:
        function: the reference composite, giving one tensor or a tuple matching `grad_outputs`.
        inputs: its inputs, None where optional ones are absent.
        needed: which inputs want a gradient.
        grad_outputs: upstream gradients, None for outputs that were not used.

    Returns:
        One entry per input, None where not needed.
    """
    outputs = function(*inputs)
    pairs = [
        (out, grad)
        for out, grad in zip((outputs,) if isinstance(outputs, Tensor) else outputs, grad_outputs, strict=True)
        if grad is not None
    ]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    )
    return [next(grads) if need and x is not None else None for x, need in zip(inputs, needed, strict=True)]
