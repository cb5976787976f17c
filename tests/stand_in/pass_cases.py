"""Prepared passes: they launch what the ordinary code launches, and only for what they were recorded with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher

from anomem import functional as AF
from anomem.kernels import contrast, passes, retrieve, tile_search
from anomem.kernels.tile_table import Tile
from tests.stand_in.calls import TRITON, Call
from tests.stand_in.recording import of, recorded

NAMES = [name for name in TRITON if name.startswith(("retrieve", "nt_xent", "info_nce"))]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    passes.forget()
    yield
    passes.forget()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Any]]:
    """Gives what a call passes to Triton's launcher: grid, stream, kernel and arguments, tensors by their layout."""
    launch, seen = CudaLauncher.__call__, []

    def record(self: Any, *arguments: Any) -> Any:
        shown = [(x.dtype, x.device, x.shape, x.stride()) if isinstance(x, Tensor) else repr(x) for x in arguments[9:]]
        seen.append((arguments[:5], shown))
        return launch(self, *arguments)

    monkeypatch.setattr(CudaLauncher, "__call__", record)

    def of_call(call: Callable[[], Any]) -> list[Any]:
        seen.clear()
        call()
        return seen.copy()

    return of_call


def prepared() -> list[passes.Pass]:
    return [one for one in passes._passes.values() if one is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_pass_does_the_same(name: str, dtype: torch.dtype, launches: Any) -> None:
    """Launches, other work and peak memory, while the pass is recorded and when it is repeated."""
    call = Call(*TRITON[name], dtype)
    passes.forget()
    calls = []
    for _ in range(4):
        torch.cuda.reset_peak_memory_stats()
        with recorded() as entries:
            passed = launches(call)
        work = [(e.what, e.grid, e.stream, e.bytes) for e in of(entries, "launch", "copy", "fill")]
        calls.append((passed, work, torch.cuda.max_memory_allocated()))
    ordinary, recording, *repeated = calls
    assert len(prepared()) == 2  # forward and backward
    assert recording[:2] == ordinary[:2]
    assert all(one[:2] == ordinary[:2] and one[2] <= ordinary[2] for one in repeated)


@contextmanager
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def step(query: Tensor, keys: Tensor, beta: float | Tensor = 1.0) -> list[Tensor]:
    out = AF.hopfield_retrieve(query, keys, beta=beta, impl="triton")
    leaves = [x for x in (query, keys) if x.requires_grad]
    return [out, *(torch.autograd.grad(out, leaves, torch.zeros_like(out)) if leaves else ())]


def matrix(rows: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    return torch.zeros(rows, 64, dtype=dtype, device=device)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.requires_grad_() for x in tensors)


OTHERS: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[[], AbstractContextManager[Any]]]] = {
    "more rows": (lambda: leaves(matrix(301), matrix(40)), nullcontext),
    "a larger memory": (lambda: leaves(matrix(300), matrix(41)), nullcontext),
    "another stride": (lambda: leaves(matrix(600).view(300, 128)[:, :64], matrix(40)), nullcontext),
    "another alignment": (lambda: leaves(matrix(301).flatten()[1:-63].view(300, 64), matrix(40)), nullcontext),
    "another dtype": (lambda: leaves(matrix(300, torch.float16), matrix(40, torch.float16)), nullcontext),
    "another GPU": (lambda: leaves(matrix(300, device="cuda:1"), matrix(40, device="cuda:1")), nullcontext),
    "another stream": (lambda: leaves(matrix(300), matrix(40)), lambda: torch.cuda.stream(torch.cuda.Stream())),
    "fewer gradients": (lambda: (matrix(300), *leaves(matrix(40))), nullcontext),
    "no gradient": (lambda: (matrix(300), matrix(40)), nullcontext),
    "another number": (lambda: (*leaves(matrix(300), matrix(40)), 2.0), nullcontext),
    "an integer": (lambda: (*leaves(matrix(300), matrix(40)), 1), nullcontext),
    "a learned number": (lambda: (*leaves(matrix(300), matrix(40)), torch.ones((), device="cuda")), nullcontext),
    "other tiles": (
        lambda: leaves(matrix(300), matrix(40)),
        lambda: tile_search.using(tile_search.Fixed("retrieve_flash_forward", Tile(64, 32, 4, 1, 24))),
    ),
    "deterministic algorithms": (lambda: leaves(matrix(300), matrix(40)), deterministic),
}  # fmt: skip
LIKE = ("an integer", "fewer gradients", "deterministic algorithms")
"""These change no launch."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_prepared_pass_is_for_one_key(name: str, launches: Any) -> None:
    given = leaves(matrix(300), matrix(40))
    base = [launches(lambda: step(*given)) for _ in range(3)][-1]
    make, setting = OTHERS[name]
    with setting():
        other = make()
        mine = launches(lambda: step(*other))
        passes.forget()
        assert mine == launches(lambda: step(*other))
    assert (mine == base) == (name in LIKE)


def test_a_prepared_pass_is_for_one_switch_of_tf32(launches: Any) -> None:
    given = leaves(matrix(300, torch.float32), matrix(40, torch.float32))
    base = [launches(lambda: step(*given)) for _ in range(3)][-1]
    with tf32():
        mine = [launches(lambda: step(*given)) for _ in range(3)]
    assert mine[0] == mine[2] != base
    assert launches(lambda: step(*given)) == base


def test_a_key_that_leaves_something_out_is_seen(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "key_of", lambda function, _: (function,))
    for _ in range(3):
        step(matrix(300), matrix(40))
    mine = launches(lambda: step(matrix(301), matrix(40)))
    passes.forget()
    assert mine != launches(lambda: step(matrix(301), matrix(40)))


def test_two_arguments_that_were_one_tensor() -> None:
    """A pass that was recorded with the same tensor twice passes two tensors where two are given."""
    z, other = matrix(128).view(1, 128, 64), matrix(128).view(1, 128, 64)
    for _ in range(2):
        passes.run(contrast.nt_xent_forward, z, z, None, 0.5)
    (one,) = prepared()
    pointers = []
    swapped = one._replace(
        steps=tuple(
            s._replace(run=lambda *a: pointers.append([x.data_ptr() for x in a if isinstance(x, Tensor)]))
            if s.grid is not None
            else s
            for s in one.steps
        )
    )
    passes._repeated(swapped, (z, other, None, 0.5))
    assert {z.data_ptr(), other.data_ptr()} <= set(pointers[0])


def test_memory_is_that_of_the_call() -> None:
    """Results of a repeated pass are new tensors, and scratch is given back."""
    query, keys = matrix(300), matrix(40)
    results = [passes.run(retrieve.forward, query, keys, None, None, 1.0, 1) for _ in range(4)]
    assert prepared()
    assert len({out.data_ptr() for out, *_ in results}) == 4
    before = torch.cuda.memory_allocated()
    del results
    results = passes.run(retrieve.forward, query, keys, None, None, 1.0, 1)
    assert torch.cuda.memory_allocated() < before
    assert sum(x.numel() * x.element_size() for x in results) <= torch.cuda.memory_allocated()


def test_what_cannot_be_repeated_runs_as_before() -> None:
    """A tensor from elsewhere, a value that is read, too many steps."""
    elsewhere, x = matrix(4), matrix(4)

    def of_elsewhere(x: Tensor) -> tuple[Tensor]:
        return (x + elsewhere,)

    def of_value(x: Tensor) -> tuple[Tensor]:
        return (x * float(x.sum()),)

    def long(x: Tensor) -> tuple[Tensor]:
        for _ in range(passes.MOST_STEPS + 1):
            x = x + 1
        return (x,)

    for function in (of_elsewhere, of_value, long):
        for _ in range(4):
            passes.run(function, x)
    assert list(passes._passes.values()) == [None] * 3


def test_steps_of_torch_are_repeated() -> None:
    """Operations that change their argument, have results by name or several of them, and views."""

    def function(x: Tensor, factor: float) -> tuple[Tensor, ...]:
        total = x.sum(0, dtype=torch.float64)
        total.mul_(factor)
        half, rest = x.split(2)
        y = torch.empty_like(half)
        torch.add(half, rest, alpha=2, out=y)
        return total, y[1:], torch.var_mean(x, 0)[1]

    x = torch.zeros(4, 8, device="cuda")
    kinds = []
    for _ in range(4):
        with recorded() as entries:
            results = passes.run(function, x, 2.0)
        kinds.append([(e.what, e.grid) for e in of(entries, "launch")])
        assert [(r.shape, r.dtype) for r in results] == [
            (torch.Size([8]), torch.float64), (torch.Size([1, 8]), torch.float32), (torch.Size([8]), torch.float32),
        ]  # fmt: skip
    assert prepared()
    assert kinds[0]
    assert all(kind == kinds[0] for kind in kinds)


def test_views_show_the_same_memory() -> None:
    """Views of an argument at another offset, of a result, of a view, and views that are made twice."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        head, tail = x.split(2)
        y = torch.empty_like(x)
        twice = y[1:3].T, y[1:].mT[:, :2]
        return x[1:], tail[1:], head.T, y[:], *twice, y.view(-1)[4:], y.unsqueeze(0)

    def shown(results: tuple[Tensor, ...], x: Tensor) -> list[Any]:
        bases = [x.data_ptr()] * 3 + [results[3].data_ptr()] * 5
        return [(r.shape, r.stride(), r.data_ptr() - base) for r, base in zip(results, bases, strict=True)]

    store = torch.zeros(12, 8, device="cuda")
    first, other = store[:4], store[4:8]
    expected = shown(function(first), first)
    for x in (first, first, first, other):
        assert shown(passes.run(function, x), x) == expected
    (one,) = prepared()
    assert len(one.steps) < 10


def test_old_keys_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "MOST_PREPARED", 4)
    x = matrix(4)
    for number in range(20):
        for _ in range(2):
            passes.run(lambda x, _: (x + 1,), x, float(number))
    assert len(passes._met) <= 4
    assert len(passes._passes) <= 4
