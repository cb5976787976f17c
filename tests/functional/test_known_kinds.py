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
