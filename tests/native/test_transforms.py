"""torch.func and forward mode over the kernels: the same derivatives as the reference, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from anomem import functional as F
from anomem.backends import Impl
from anomem.errors import ArgumentError
from anomem.testing import draw

POSITIVE = torch.arange(4)
Call = Callable[[Tensor, Impl], Tensor]
CALLS: dict[str, tuple[Call, tuple[int, ...]]] = {
    "retrieve": (lambda x, impl: F.hopfield_retrieve(x, draw(5, 6, seed=1).double(), impl=impl), (4, 6)),
    "shrink": (lambda x, impl: F.hopfield_retrieve(x, draw(5, 6, seed=1).double(), shrink=0.1, impl=impl), (4, 6)),
    "nt_xent": (lambda x, impl: F.nt_xent(x, x.flip(0), reduction="none", impl=impl), (4, 6)),
    "info_nce": (lambda x, impl: F.info_nce(x, x.flip(0), POSITIVE, reduction="none", impl=impl), (4, 6)),
    "gather": (lambda x, impl: F.gather_positions(x, torch.tensor([0, 3]), impl=impl), (2, 3, 2, 2)),
    "gather normalised": (
        lambda x, impl: F.gather_positions(x, torch.tensor([0, 3]), normalize=True, impl=impl),
        (2, 3, 2, 2),
    ),
    "variance": (lambda x, impl: F.variance_hinge(0.5 * x, impl=impl), (4, 6)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_jacobian_in_reverse_mode(name: str) -> None:
    """jacrev runs the backward after the level at which its inputs required a gradient has closed."""
    call, shape = CALLS[name]
    x = draw(*shape).double()
    mine = torch.func.jacrev(lambda x: call(x, "native"))(x)
    torch.testing.assert_close(mine, torch.func.jacrev(lambda x: call(x, "reference"))(x))


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_over_a_backward(name: str) -> None:
    """A tangent of the upstream gradient reaches the gradient; the kernels alone would drop it without a word."""
    call, shape = CALLS[name]
    x = draw(*shape).double().requires_grad_()
    tangents = []
    impls: tuple[Impl, ...] = ("native", "reference")
    for impl in impls:
        out = call(x, impl)
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(out), draw(*out.shape, seed=2).double())
            (gradient,) = torch.autograd.grad(out, x, upstream)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


def test_auto_takes_the_reference_in_forward_mode() -> None:
    x, y = draw(4, 6), draw(4, 6, seed=1)
    auto = torch.func.hessian(lambda x: F.nt_xent(x, y))(x)
    torch.testing.assert_close(auto, torch.func.hessian(lambda x: F.nt_xent(x, y, impl="reference"))(x))
    with pytest.raises(ArgumentError, match="forward-mode differentiation"):
        torch.func.jvp(lambda x: F.nt_xent(x, y, impl="native"), (x,), (x,))


def test_a_differentiable_gradient_under_autocast_is_exact() -> None:
    x, y = draw(64, 32, dtype=torch.bfloat16), draw(64, 32, dtype=torch.bfloat16, seed=1)
    temperature = torch.tensor(0.2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.nt_xent(x, y, temperature=temperature, impl="native")
        (differentiable,) = torch.autograd.grad(loss, temperature, create_graph=True)
    exact = F.nt_xent(x.double(), y.double(), temperature=temperature.double(), impl="reference")
    (expected,) = torch.autograd.grad(exact, temperature)
    torch.testing.assert_close(differentiable.detach(), expected)
