"""Double backward: the gradient of a gradient comes from the reference, which PyTorch can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def wants_graph() -> bool:
    """Whether the running backward pass must itself be differentiable: `create_graph=True`, or forward mode over it.

    A compiled backward never is, so there the kernels always run.
    """
    return (torch.is_grad_enabled() or in_forward_mode()) and not torch.compiler.is_compiling()


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation (jvp, jacfwd, `forward_ad.dual_level`) is open."""
    return forward_ad._current_level >= 0  # −1 when none is


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
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    used = [i for i, grad in enumerate(grad_outputs) if grad is not None]

    def of_wanted(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = iter(leaves)
        outputs = function(*(next(given) if n and x is not None else x for x, n in zip(inputs, needed, strict=True)))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return tuple(outputs[i] for i in used)

    # Not torch.autograd.grad: under torch.func the saved inputs may have left the level at which they required one.
    with torch.autocast(wanted[0].device.type, enabled=False):
        pullback = torch.func.vjp(of_wanted, *wanted)[1]
        grads = iter(pullback(tuple(grad_outputs[i] for i in used)))
    return [next(grads) if need and x is not None else None for x, need in zip(inputs, needed, strict=True)]
