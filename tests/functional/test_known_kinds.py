"""A call like an earlier one skips the checks and the choice, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import backends
from anomem.errors import ArgumentError
from anomem.functional import hopfield_retrieve, nt_xent
from anomem.ops import native
from anomem.testing import draw

CALLS: dict[str, Callable[..., Tensor]] = {"retrieve": hopfield_retrieve, "nt_xent": nt_xent}
ROWS = {"retrieve": 9, "nt_xent": 12}
"""Of the second tensor."""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    if (reason := native.obstacle("cpu")) is not None:
        pytest.skip(reason)
    backends.forget()
    yield
    backends.forget()


@pytest.fixture(params=CALLS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def inputs(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(12, 32, seed=1, dtype=dtype), draw(ROWS[name], 32, seed=2, dtype=dtype)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators for which a choice was asked."""
    asked: list[str] = []
    choose = backends.choose

    def spy(problem: Any, *arguments: Any, **options: Any) -> str:
        asked.append(problem.operator)
        return choose(problem, *arguments, **options)

    monkeypatch.setattr(backends, "choose", spy)
    return asked


def test_the_second_call_has_the_bits_of_the_first_and_asks_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, found = counted(monkeypatch), []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in inputs(name)]
        out = CALLS[name](*leaves, impl="native")
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert asked == [name]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_gradients_of_gradients(name: str) -> None:
    def second(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs(name, torch.float64)]
        upstream = torch.ones_like(call(*leaves)).cos().requires_grad_()
        first = torch.autograd.grad(call(*leaves), leaves, upstream, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), [*leaves, upstream]))

    CALLS[name](*[x.requires_grad_() for x in inputs(name, torch.float64)], impl="native")
    found = second(lambda *given: CALLS[name](*given, impl="native"))
    expected = second(lambda *given: CALLS[name](*given, impl="reference"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("trained", [0, 1])
def test_gradients_of_one_input_alone(name: str, trained: int) -> None:
    for _ in range(2):
        given = inputs(name)
        given[trained].requires_grad_()
        out = CALLS[name](*given, impl="native").sum()
        (found,) = torch.autograd.grad(out, given[trained])
    leaves = [x.requires_grad_() for x in inputs(name)]
    expected = torch.autograd.grad(CALLS[name](*leaves, impl="native").sum(), leaves)[trained]
    assert torch.equal(found, expected)


def test_batched_gradients(name: str) -> None:
    for _ in range(2):
        leaves = [x.requires_grad_() for x in inputs(name)]
        out = CALLS[name](*leaves, impl="native")
    upstream = torch.stack([torch.full_like(out, factor) for factor in (1.0, 2.0)])
    batched = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        for found, expected in zip(batched, torch.autograd.grad(out, leaves, one, retain_graph=True), strict=True):
            torch.testing.assert_close(found[i], expected)


def test_saved_tensors_may_come_back_with_other_strides(name: str) -> None:
    def gradients() -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in inputs(name)]
        return torch.autograd.grad(CALLS[name](*leaves, impl="native").sum(), leaves)

    gradients()
    expected = gradients()

    def strided(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), strided):
        found = gradients()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_change_in_place_before_the_backward_pass_is_refused(name: str) -> None:
    for _ in range(2):
        leaves = [x.requires_grad_() for x in inputs(name)]
        given = [x * 1 for x in leaves]
        out = CALLS[name](*given, impl="native").sum()
    given[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_strides_are_no_matter(name: str) -> None:
    x, y = inputs(name)
    expected = CALLS[name](x, y)
    for _ in range(2):
        strided = CALLS[name](x.T.contiguous().T, torch.nn.functional.pad(y, (1, 2))[:, 1:-2])
        assert torch.equal(strided, expected)


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        (lambda x, y: ((x, y[:, :-1]), {}), "prototypes|z_pair"),
        (lambda x, y: ((x.double(), y), {}), "prototypes|z_pair"),
        (lambda x, y: ((x.int(), y), {}), "query|z"),
        (lambda x, y: ((x, y.to_sparse()), {}), "prototypes|z_pair"),
        (lambda x, y: ((x, y.to("meta")), {}), "prototypes|z_pair"),
        (lambda x, y: ((x, y.tolist()), {}), "prototypes|z_pair"),
        (lambda x, y: ((x, y), {"impl": "fastest"}), "impl"),
        (lambda x, y: ((x, y), {"impl": ["native"]}), "impl"),
    ],
)
def test_mistakes_after_a_right_call(name: str, changed: Callable[..., Any], argument: str) -> None:
    x, y = inputs(name)
    for _ in range(2):
        CALLS[name](x, y)
    arguments, options = changed(x, y)
    with pytest.raises(ArgumentError, match=f"`({argument})`"):
        CALLS[name](*arguments, **options)


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"steps": 1.0}, "steps"),
        ({"normalize": ["layer"]}, "normalize"),
        ({"beta": torch.nan}, "beta"),
        ({"beta": True}, "beta"),
    ],
)
def test_mistakes_in_what_retrieval_takes(wrong: dict[str, Any], argument: str) -> None:
    x, y = inputs("retrieve")
    for beta in (None, None, 1.0, 1.0):
        hopfield_retrieve(x, y, beta=beta)
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        hopfield_retrieve(x, y, **wrong)


def test_mistakes_in_what_the_contrast_takes() -> None:
    x, y = inputs("nt_xent")
    for _ in range(2):
        nt_xent(x, y)
    for wrong in ({"temperature": 0.0}, {"temperature": torch.nan}, {"reduction": "max"}):
        with pytest.raises(ArgumentError, match=r"`(temperature|reduction)`"):
            nt_xent(x, y, **wrong)  # type: ignore[arg-type]
    assert not torch.equal(nt_xent(x, y, temperature=0.5), nt_xent(x, y))


def test_what_is_on_around_a_call_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = inputs(name)
    for _ in range(2):
        CALLS[name](x, y)
    asked = counted(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = CALLS[name](x, y)
    assert torch.equal(cast, CALLS[name](x.bfloat16(), y.bfloat16()))
    with torch.no_grad():
        CALLS[name](x, y)
    torch.func.grad(lambda x: CALLS[name](x, y).sum())(x)
    assert asked == [name] * 4
    backends.forget()
    CALLS[name](x, y)
    assert asked == [name] * 5


def test_retrieval_of_other_betas_and_normalisations() -> None:
    x, y = inputs("retrieve")
    for _ in range(2):
        found = [hopfield_retrieve(x, y, beta=beta, normalize=how) for beta in (None, 0.5) for how in ("layer", "none")]
        assert all(not torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])
