"""The read of a filled memory, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.errors import ArgumentError
from anomem.functional import hopfield_retrieve, nearest, read_memory
from anomem.rules import Impl
from anomem.testing import compare, draw
from tests.operators.contract import (
    F32,
    F64,
    NATIVE,
    REFERENCE,
    TRITON,
    Contract,
    Function,
    cases,
    compare_values,
    each,
    each_dtype,
)

ALL = (REFERENCE, NATIVE, TRITON)
KERNELS = (NATIVE, TRITON)


def reading(impl: Impl, **options: Any) -> Function:
    """(query, prototypes, bias, beta) -> the differentiable results."""

    def call(query: Tensor, prototypes: Tensor, bias: Tensor | None = None, beta: Any = 0.6) -> tuple[Tensor, ...]:
        found = read_memory(query, prototypes, bias=bias, beta=beta, impl=impl, **options)
        return tuple(x for i, x in enumerate(found) if x is not None and i != 4)

    return call


class TestRead(Contract):
    """Rows are queries; half of the prototypes are read, and the nearest of all is found."""

    implementations = ALL

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 6, dtype=dtype, seed=2), draw(4, 6, dtype=dtype, seed=1)]

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(4, seed=3).to(F64 if dtype == F64 else F32), torch.tensor(0.4, dtype=F64 if dtype == F64 else F32)]

    def call(self, impl: Impl, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(reading(impl, top_k=2, nearest=True)(*inputs))

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        query, prototypes = (x[None] for x in self.inputs(5))
        bias, beta = self.parameters()
        arguments = (query, prototypes, beta, 0.5, bias[None], 1, 2, True, True)
        yield getattr(torch.ops.anomem, f"{impl}_read"), arguments
        yield getattr(torch.ops.anomem, f"{impl}_read"), (query, prototypes, None, 0.5, None, 1, 0, False, False)

    def test_the_shapes_of_gradients_are_known(self) -> None:
        """The backward calls autograd, so only its fake can be checked below autograd."""
        query, prototypes = (x[None] for x in self.inputs(5))
        bias, beta = self.parameters()
        grads = [draw(1, 5, 6), *(draw(1, 5) for _ in range(3)), draw(0), *(draw(1, 5) for _ in range(2))]
        operator = torch.ops.anomem.reference_read_bwd.default
        for learned, added in ((beta, bias[None]), (None, None)):
            arguments = (grads, query, prototypes, learned, 0.5, added, 1, 2, True, True)
            given = [x.shape for x in operator(*arguments)]
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                assert [x.shape for x in operator(*arguments)] == given

    def test_saved_tensors_may_come_back_in_another_layout(self, impl: Impl) -> None:
        """The gradient is plain PyTorch's, whose products may differ in the last bit."""
        inputs = [*self.inputs(6), *self.parameters()]
        expected = self.results(self.function(impl), inputs)
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x if x.dim() < 2 else x.mT.clone().mT):
            got = self.results(self.function(impl), inputs)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


# N, M, d: tails of vectors, panels, tiles of columns and chunks of rows.
SIZES = [(1, 1, 1), (5, 3, 7), (43, 70, 33), (90, 1100, 40)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nearest": True, "deviation": True},
    {"top_k": 1},
    {"top_k": 3, "deviation": True},
    {"top_k": 16, "nearest": True},
]


@cases(
    "dtype, sizes, options",
    {
        NATIVE: product(NATIVE.dtypes, SIZES, OPTIONS),
        TRITON: [
            *product([F32], SIZES[:2], OPTIONS),
            *product(TRITON.dtypes, SIZES[2:3], OPTIONS[1:5:2]),
            (F32, (3, 2100, 8), {"top_k": 2}),
        ],
    },
)
def test_read_within_budget(
    impl: Impl, dtype: torch.dtype, sizes: tuple[int, int, int], options: dict[str, Any]
) -> None:
    n, m, d = sizes
    options = options | {"top_k": min(options["top_k"], m)} if "top_k" in options else options
    bias = draw(m, seed=3).to(F64 if dtype == F64 else F32)

    def run(name: Impl, query: Tensor, prototypes: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = read_memory(query, prototypes, bias=bias, beta=0.6, impl=name, **options)
        return tuple(x for x in found if x is not None)

    compare_values(run, impl, [draw(n, d, dtype=dtype), draw(m, d, dtype=dtype, seed=1), bias])


@cases("kind", {NATIVE: [("close",), ("one large channel",), ("far from zero",), ("mixed lengths",)]})
def test_no_result_depends_on_the_rough_product(impl: Impl, kind: str) -> None:
    """What bytes and bfloat16 cannot tell apart, or leave many candidates of, is read as float32 has it."""
    query, prototypes = draw(100, 70), draw(1500, 70, seed=1)
    if kind == "close":
        query, prototypes = query[:1] + query * 1e-3, query[:1] + prototypes * 1e-3
    elif kind == "one large channel":
        query[:, 3], prototypes[:, 3] = 300.0, 300 + prototypes[:, 3]
    elif kind == "far from zero":
        query, prototypes = query + 20, prototypes + 20
    else:
        prototypes *= torch.logspace(-6, 2, 1500)[:, None]
    options = {"top_k": 8, "nearest": True, "normalize": "none", "beta": 0.5, "deviation": True}

    def run(name: Impl, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for x in read_memory(*tensors, impl=name, **options) if x is not None)  # type: ignore[arg-type]

    compare_values(run, impl, [query, prototypes])


@cases("normalize", {one: [("layer",), ("l2",), ("none",)] for one in KERNELS})
def test_gradients_within_budget(impl: Impl, normalize: str) -> None:
    """Of query, prototypes, bias and a learned beta, from every result."""
    inputs = [draw(9, 12), draw(7, 12, seed=1), draw(7, seed=2), torch.tensor(0.7)]
    for top_k in (None, 3):
        options = {"normalize": normalize, "top_k": top_k, "nearest": True, "deviation": True}
        compare(reading(impl, **options), reading("reference", **options), inputs)


@each(NATIVE)
def test_gradients_are_summed_over_blocks(impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomem.ops.read.BLOCK_SCORES", 21)
    inputs = [draw(10, 12), draw(7, 12, seed=1), draw(7, seed=2), torch.tensor(0.7)]
    compare(reading(impl, top_k=4), reading("reference", top_k=4), inputs)


@each_dtype(*ALL, among=(F32,))
def test_all_prototypes_are_a_retrieval(impl: Impl, dtype: torch.dtype) -> None:
    query, prototypes = draw(2, 5, 12, dtype=dtype), draw(9, 12, dtype=dtype, seed=1)
    found = read_memory(query, prototypes, beta=0.4, impl=impl)
    out, lse, entropy = hopfield_retrieve(
        query, prototypes, beta=0.4, return_lse=True, return_entropy=True, impl="reference"
    )
    torch.testing.assert_close((found.out, found.lse, found.entropy), (out, lse, entropy), rtol=1e-5, atol=1e-5)
    assert found.distance is None
    assert found.indices is None
    assert found.residual.shape == (2, 5)


@each(*ALL)
def test_one_prototype_with_the_bias_of_distances_is_the_nearest(impl: Impl) -> None:
    """PatchCore: its residual is the distance."""
    query, prototypes, tau = draw(40, 12), draw(30, 12, seed=1) * 2, 3.0
    bias = prototypes.square().sum(dim=1) / -tau
    options: dict[str, Any] = {"beta": 2 / tau, "bias": bias, "normalize": "none", "nearest": True, "impl": impl}
    found = read_memory(query, prototypes, top_k=1, **options)
    expected = nearest(query, prototypes, impl="reference")
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.distance, expected.distance)
    torch.testing.assert_close(found.residual.square(), expected.distance)
    torch.testing.assert_close(found.out, prototypes[expected.indices])
    assert not bool(found.entropy.any())
    soft = read_memory(query, prototypes, **options)
    weights = (torch.cdist(query, prototypes).square() / -tau).softmax(dim=1)
    torch.testing.assert_close(soft.out, weights @ prototypes, rtol=1e-4, atol=1e-4)
    assert torch.equal(soft.indices, expected.indices)


@cases("shared", {one: [(False,), (True,)] for one in ALL})
def test_banks_are_read_one_by_one(impl: Impl, shared: bool) -> None:
    query, banks, bias = draw(3, 20, 12), draw(3, 11, 12, seed=1), draw(3, 11, seed=2)
    for top_k in (None, 2):
        options = {"top_k": top_k, "nearest": True, "deviation": True, "impl": impl}
        found = read_memory(query[0] if shared else query, banks, bias=bias, **options)
        for bank in range(3):
            alone = read_memory(query[0 if shared else bank], banks[bank], bias=bias[bank], **options)
            for one, other in zip(found, alone, strict=True):
                torch.testing.assert_close(one[bank], other)


@each(*ALL)
def test_the_first_of_equal_prototypes_is_read(impl: Impl) -> None:
    query, prototypes = draw(20, 8).round(), draw(3, 8, seed=1).round().repeat(20, 1)
    found = read_memory(query, prototypes, top_k=4, normalize="none", beta=0.25, impl=impl)
    expected = read_memory(query, prototypes[:12], top_k=4, normalize="none", beta=0.25, impl="reference")
    for one, other in zip(found, expected, strict=True):
        assert one is None or torch.allclose(one, other, atol=1e-5)


@each(*ALL)
def test_of_equal_scores_the_first_is_read(impl: Impl) -> None:
    """Different prototypes of the same score: whole numbers, so that every implementation sees the tie."""
    query = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(3, 4)
    prototypes = torch.tensor([[0.0, 9, 0, 0], [2, 1, 0, 0], [1, 5, 0, 0], [1, 0, 5, 0], [1, 0, 0, 5], [0, 0, 9, 9]])
    found = read_memory(query, prototypes, top_k=3, normalize="none", beta=1.0, impl=impl)
    expected = read_memory(query, prototypes[[1, 2, 3]], normalize="none", beta=1.0, impl="reference")
    torch.testing.assert_close(found.out, expected.out)


@each(*ALL)
def test_lengths_whose_squares_are_too_small_for_float32(impl: Impl) -> None:
    """The bound of the rough product came out as 0, and another prototype was read."""
    generator = torch.Generator().manual_seed(0)
    query, prototypes = (torch.randn(n, 64, generator=generator) for n in (90, 700))
    query, prototypes = query * 1e17, prototypes * 1e-24
    options: dict[str, Any] = {"beta": 1e8, "normalize": "none", "top_k": 1}
    found = read_memory(query, prototypes, **options, impl=impl)
    exact = read_memory(query.double(), prototypes.double(), **options, impl="reference")
    torch.testing.assert_close(found.lse.double(), exact.lse, rtol=1e-5, atol=1e-3)


@each(*ALL)
def test_a_prototype_without_a_chance_is_not_read(impl: Impl) -> None:
    query, prototypes, bias = draw(20, 8), draw(5, 8, seed=1), torch.zeros(5)
    bias[2] = -torch.inf
    for top_k in (None, 3):
        found = read_memory(query, prototypes, bias=bias, top_k=top_k, impl=impl)
        expected = read_memory(query, prototypes[[0, 1, 3, 4]], top_k=top_k, impl=impl)
        torch.testing.assert_close(found.out, expected.out)
        torch.testing.assert_close(found.lse, expected.lse)


@cases(
    "kind, normalize",
    {
        one: [
            *product(["no chance", "infinite bias", "bias of NaN", "infinite queries"], ["none", "layer"]),
            *product(["products above the range", "products below the range"], ["none"]),
        ]
        for one in KERNELS
    },
)
def test_infinite_scores_give_what_the_reference_gives(impl: Impl, kind: str, normalize: str) -> None:
    query, prototypes, bias = draw(9, 8), draw(7, 8, seed=1), draw(7, seed=2)
    if kind == "no chance":
        bias[:] = -torch.inf
    elif kind == "infinite bias":
        bias[2] = torch.inf
    elif kind == "bias of NaN":
        bias[2] = torch.nan
    elif kind == "infinite queries":
        query[2, 3], query[4, 1], query[5] = torch.inf, -torch.inf, torch.inf
    else:
        query, prototypes = query.abs(), prototypes.abs() * 1e20
        query[1] *= -1e25 if "below" in kind else 1e25
        bias[4] = -torch.inf
    for top_k in (None, 1, 3, 7):
        options: dict[str, Any] = {"bias": bias, "beta": 0.6, "normalize": normalize, "top_k": top_k}
        found, expected = (read_memory(query, prototypes, **options, impl=name) for name in (impl, "reference"))
        torch.testing.assert_close(found[:3], expected[:3], equal_nan=True, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[5:], expected[5:], equal_nan=True, rtol=1e-4, atol=1e-4)


@each(REFERENCE, NATIVE)
def test_a_bad_query_spoils_its_own_row_only(impl: Impl) -> None:
    query, prototypes = draw(50, 8), draw(70, 8, seed=1)
    query[7, 2] = torch.nan
    for top_k in (None, 4):
        found = read_memory(query, prototypes, top_k=top_k, nearest=True, impl=impl)
        for x in (found.out[:, 0], found.residual, found.cosine, found.entropy, found.lse, found.distance):
            assert x is not None
            assert torch.equal(x.isnan().nonzero().flatten(), torch.tensor([7]))


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    query, prototypes = draw(700, 20), draw(300, 20, seed=1)
    expected = read_memory(query, prototypes, top_k=8, nearest=True, impl="native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = read_memory(query, prototypes, top_k=8, nearest=True, impl="native")
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 4}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"bias": draw(4)}, "bias"),
        ({"bias": draw(1, 3)}, "bias"),
        ({"beta": torch.nan}, "beta"),
        ({"normalize": "batch"}, "normalize"),
    ],
)
def test_mistakes(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        read_memory(draw(5, 4), draw(3, 4, seed=1), **options)
