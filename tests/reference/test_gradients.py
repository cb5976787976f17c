"""First and second derivatives of every formula, and the closed forms that the kernels implement."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from anomem import reference as R


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


POSITIVE, EXCLUDE = torch.tensor([2, 0, 1]), torch.tensor([0, 1, 3])
CASES: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "retrieve layer": (lambda q, k: tuple(R.hopfield_retrieve(q, k)[:2]), (leaf(3, 4), leaf(5, 4, seed=1))),
    "retrieve l2": (lambda q, k: tuple(R.hopfield_retrieve(q, k, normalize="l2")), (leaf(3, 4), leaf(5, 4, seed=1))),
    "retrieve values, beta, two steps": (
        lambda q, k, v, b: R.hopfield_retrieve(q, k, values=v, beta=b, steps=2, normalize="none").out,
        (leaf(3, 4), leaf(5, 4, seed=1), leaf(5, 2, seed=2), scalar(0.7)),
    ),
    "retrieve shrunk": (
        lambda q, k: R.hopfield_retrieve(q, k, shrink=0.1).out,
        (leaf(3, 4), leaf(5, 4, seed=1)),
    ),
    "entropy": (
        lambda q, k: R.weights_entropy(R.hopfield_retrieve(q, k, shrink=0.1).weights),
        (leaf(3, 4), leaf(5, 4, seed=1)),
    ),
    "nt_xent": (R.nt_xent_rows, (leaf(2, 3, 4), leaf(2, 3, 4, seed=1), scalar(0.3))),
    "info_nce": (
        lambda r, c, t: R.info_nce_rows(r, c, POSITIVE, EXCLUDE, t),
        (leaf(2, 3, 4), leaf(2, 4, 4, seed=1), scalar(0.3)),
    ),
    "variance": (lambda x: R.variance_hinge(0.5 * x), (leaf(2, 3, 4),)),
    "gather": (
        lambda m: R.gather_positions(m, torch.tensor([1, 3, 1]), normalize=True),
        (leaf(2, 3, 2, 2),),
    ),
    "conv3x3": (R.conv3x3, (leaf(2, 3, 5, 4), leaf(4, 3, 3, 3, seed=1))),
    "downsample": (R.downsample, (leaf(2, 3, 5, 4), leaf(2, 3, 3, 3, seed=1), leaf(4, 3, 1, 1, seed=2))),
    "deviation": (R.deviation, (leaf(3, 4), leaf(5, 4, seed=1))),
    "distance cosine": (lambda a, b: R.distance(a, b, "cosine"), (leaf(3, 4), leaf(3, 4, seed=1))),
    "scale loss": (
        lambda a, b, k: R.contrasted_memory_loss(
            a, b, k, is_normal=torch.tensor([True, False, True]), negatives="both"
        ),
        (leaf(2, 3, 4), leaf(2, 3, 4, seed=1), leaf(5, 4, seed=2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    function, inputs = CASES[name]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_retrieval_gradient_is_the_closed_form() -> None:
    query, keys, values, beta = leaf(3, 4), leaf(5, 4, seed=1), leaf(5, 2, seed=2), scalar(0.7)
    retrieval = R.hopfield_retrieve(query, keys, values=values, beta=beta, normalize="none")
    dout, dlse = leaf(3, 2, seed=3).detach(), leaf(3, seed=4).detach()
    actual = torch.autograd.grad((retrieval.out, retrieval.lse), (query, keys, values, beta), (dout, dlse))
    with torch.no_grad():
        scores, weights = beta * query @ keys.T, retrieval.weights
        delta = (dout * retrieval.out).sum(-1, keepdim=True)
        dscores = weights * (dout @ values.T - delta + dlse[:, None])
        expected = (
            beta * dscores @ keys,
            beta * dscores.T @ query,
            weights.T @ dout,
            (dscores * scores).sum() / beta,
        )
    torch.testing.assert_close(actual, expected)


def test_nt_xent_gradient_is_the_closed_form() -> None:
    tau, batch = 0.3, 4
    unit = R.l2_normalize(leaf(1, 2 * batch, 5)).detach().requires_grad_()
    index = torch.arange(2 * batch)
    loss = R.contrast_rows(unit, unit, index.roll(batch), index, tau).mean()
    (actual,) = torch.autograd.grad(loss, unit)
    with torch.no_grad():
        scores = (unit @ unit.mT / tau)[0].fill_diagonal_(-torch.inf)
        weights = scores.softmax(-1)
        expected = ((weights + weights.T) @ unit[0] - 2 * unit[0].roll(batch, 0)) / (tau * 2 * batch)
    torch.testing.assert_close(actual[0], expected)


def test_a_zero_row_has_zero_gradient_to_every_order() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    unit = R.l2_normalize(x)
    (first,) = torch.autograd.grad((unit + unit**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
    assert not unit.any()
    assert not first.any()
    assert second is None or not second.any()


def test_tied_retrieval_gradient_through_the_normalisation_is_the_closed_form() -> None:
    """As derived at the head of anomem/reference/retrieve.py."""
    for normalize in ("layer", "l2"):
        query, keys = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (6, 4))
        beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        retrieval = R.hopfield_retrieve(query, keys, beta=beta, normalize=normalize)  # type: ignore[arg-type]
        dout, dlse = torch.randn_like(retrieval.out), torch.randn_like(retrieval.lse)
        expected = torch.autograd.grad(retrieval[:2], (query, keys, beta), (dout, dlse))
        with torch.no_grad():
            q, k = (R.normalize_rows(x, normalize) for x in (query, keys))  # type: ignore[arg-type]
            weights = torch.exp(beta * q @ k.T - retrieval.lse[:, None])
            delta = (dout * retrieval.out).sum(1)
            dscores = weights * (dout @ k.T - delta[:, None] + dlse[:, None])
            dq, dk = beta * dscores @ k, beta * dscores.T @ q + weights.T @ dout

            def through(dy: Tensor, y: Tensor, x: Tensor, normalize: str = normalize) -> Tensor:
                if normalize == "l2":
                    return (dy - y * (y * dy).sum(1, keepdim=True)) / x.norm(dim=1, keepdim=True)
                std = (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                return (dy - dy.mean(1, keepdim=True) - y * (y * dy).mean(1, keepdim=True)) / std

            derived = through(dq, q, query), through(dk, k, keys), (dscores * (q @ k.T)).sum()
        torch.testing.assert_close(derived, expected)


def test_nt_xent_gradients_of_weighted_rows_are_the_closed_form() -> None:
    """As derived at the head of anomem/reference/contrast.py; that of tau too."""
    unit = R.l2_normalize(torch.randn(8, 5, dtype=torch.float64)).requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    every = torch.arange(8)
    opposite = every.roll(4)
    rows = R.contrast_rows(unit, unit, opposite, every, tau)
    g = torch.randn_like(rows)
    expected = torch.autograd.grad(rows, (unit, tau), g)
    with torch.no_grad():
        s = unit @ unit.T / tau
        lse = torch.logsumexp(s.masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf), dim=1)
        p = torch.exp(s - lse[:, None]).fill_diagonal_(0)
        ds = g[:, None] * (p - torch.nn.functional.one_hot(opposite))
        du = (ds + ds.T) @ unit / tau
        torch.testing.assert_close(
            du, ((g[:, None] * p + g * p.T) @ unit - (g + g[opposite])[:, None] * unit[opposite]) / tau
        )
    torch.testing.assert_close((du, -(ds * s).sum() / tau), expected)


def test_info_nce_gradients_are_the_closed_form() -> None:
    rows, columns = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 6))
    positive, exclude = torch.tensor([0, 5, 2, 2]), torch.tensor([1, 0, 0, 5])
    losses = R.contrast_rows(rows, columns, positive, exclude, 0.3)
    g = torch.randn_like(losses)
    expected = torch.autograd.grad(losses, (rows, columns), g)
    with torch.no_grad():
        hidden = torch.nn.functional.one_hot(exclude, 6).bool()
        p = torch.softmax((rows @ columns.T / 0.3).masked_fill(hidden, -torch.inf), dim=1)
        ds = g[:, None] * (p - torch.nn.functional.one_hot(positive, 6))
    torch.testing.assert_close((ds @ columns / 0.3, ds.T @ rows / 0.3), expected)
