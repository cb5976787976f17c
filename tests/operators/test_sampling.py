"""The gather of sampled positions and the variance hinge by every implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import reference as R
from anomem.functional import gather_positions, variance_hinge
from anomem.rules import Impl
from anomem.testing import compare, draw, gradients
from tests.operators.contract import (
    BF16,
    F16,
    F32,
    F64,
    NATIVE,
    REFERENCE,
    Contract,
    assert_same_values,
    cases,
    each,
)

ALL = (REFERENCE, NATIVE)
OPERATORS = torch.ops.anomem


def positions_in(area: int, *shape: int) -> Tensor:
    return torch.randint(area, shape, generator=torch.Generator().manual_seed(7))


class TestGather(Contract):
    """Rows are images, all sampled at the same positions; one of them twice."""

    implementations = ALL
    cast = False

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 3, 2, 3, dtype=dtype), torch.tensor([5, 0, 5])]

    def call(self, impl: Impl, *inputs: Any) -> Tensor:
        return gather_positions(*inputs, normalize=False, impl=impl)

    def plain(self, impl: Impl, *inputs: Any) -> Tensor:
        return R.gather_positions(*inputs, normalize=False)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        feature_map, positions = draw(2, 5, 3, 4), torch.tensor([7, 0, 7])
        for channels_last in (False, True):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            arguments = (feature_map.contiguous(memory_format=layout), positions, True)
            yield OPERATORS.native_gather_fwd, arguments
            out, inv_norm = OPERATORS.native_gather_fwd(*arguments)
            yield OPERATORS.native_gather_bwd, (out, out, inv_norm, positions, [2, 5, 3, 4], channels_last, True)


class TestGatherOfUnitVectors(TestGather):
    """L2-normalised."""

    def call(self, impl: Impl, *inputs: Any) -> Tensor:
        return gather_positions(*inputs, normalize=True, impl=impl)

    def plain(self, impl: Impl, *inputs: Any) -> Tensor:
        return R.gather_positions(*inputs, normalize=True)


class TestVariance(Contract):
    """Rows are those of a group: at least two."""

    implementations = ALL
    cast = False
    sizes = (2, 17)

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(2, rows, 5, dtype=dtype)]

    def call(self, impl: Impl, *inputs: Any) -> Tensor:
        return variance_hinge(*inputs, gamma=2.0, reduction="none", impl=impl)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        rows = draw(2, 6, 5)
        yield OPERATORS.native_variance_fwd, (rows, 2.0, 1e-4)
        loss, mean, std = OPERATORS.native_variance_fwd(rows, 2.0, 1e-4)
        yield OPERATORS.native_variance_bwd, (loss, rows, mean, std, 2.0)


# B, C, H, W, n: every size meets a tail of some block, and few images as well as many.
MAPS = [(1, 1, 1, 1, 1), (3, 5, 4, 7, 9), (20, 33, 5, 5, 70), (2, 130, 16, 16, 64)]


@cases("dtype, normalize, per_image, shape", {NATIVE: product(NATIVE.dtypes, (False, True), (False, True), MAPS)})
def test_gather_within_budget(
    impl: Impl, dtype: torch.dtype, normalize: bool, per_image: bool, shape: tuple[int, int, int, int, int]
) -> None:
    """Positions repeat in most shapes: there the gradients add up."""
    batch, channels, height, width, count = shape
    leading = (batch,) if per_image else ()
    positions = positions_in(height * width, *leading, count)
    compare(
        lambda x: gather_positions(x, positions, normalize=normalize, impl=impl),
        lambda x: R.gather_positions(x, positions, normalize=normalize),
        [draw(batch, channels, height, width, dtype=dtype)],
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2],
}


@cases("dtype, layout", {one: product((F32, BF16), LAYOUTS) for one in ALL})
def test_gather_from_any_layout(impl: Impl, dtype: torch.dtype, layout: str) -> None:
    """The same bits as from a contiguous map, and a gradient in the layout of the map."""
    feature_map = LAYOUTS[layout](draw(3, 37, 4, 5, dtype=dtype))
    positions = positions_in(20, 3, 11)
    results = []
    for x in (feature_map.detach(), feature_map.contiguous()):
        leaf = x.requires_grad_()
        vectors = gather_positions(leaf, positions, normalize=True, impl=impl)
        (gradient,) = torch.autograd.grad(vectors, leaf, draw(*vectors.shape, dtype=dtype, seed=2))
        results.append((vectors, gradient))
    assert_same_values(*results, impl)
    if layout == "channels_last":
        assert results[0][1].is_contiguous(memory_format=torch.channels_last)


@each(*ALL)
def test_gather_without_normalisation_copies(impl: Impl) -> None:
    feature_map, positions = draw(3, 5, 4, 7), positions_in(28, 3, 9)
    expected = R.gather_positions(feature_map, positions)
    assert torch.equal(gather_positions(feature_map, positions, impl=impl), expected)


@each(*ALL)
def test_a_zero_vector_stays_zero_and_passes_no_gradient(impl: Impl) -> None:
    feature_map = draw(2, 6, 2, 2)
    feature_map[1, :, 0, 1] = 0
    leaf = feature_map.requires_grad_()
    vectors = gather_positions(leaf, torch.arange(4), normalize=True, impl=impl)
    (gradient,) = torch.autograd.grad(vectors.sum(), leaf)
    assert bool((vectors[1, 1] == 0).all() and (gradient[1, :, 0, 1] == 0).all())
    assert bool((gradient[0] != 0).all())


@cases("bad", {NATIVE: [(torch.nan,), (torch.inf,)]})
def test_a_bad_vector_spoils_itself_only(impl: Impl, bad: float) -> None:
    feature_map = draw(2, 6, 2, 2)
    feature_map[1, 3, 0, 1] = bad
    got = gather_positions(feature_map, torch.arange(4), normalize=True, impl=impl)
    expected = R.gather_positions(feature_map, torch.arange(4), normalize=True)
    assert torch.equal(got.isnan(), expected.isnan())


@cases(
    "shape, per_image",
    {one: product([(0, 4, 2, 2, 3), (2, 4, 2, 2, 0), (2, 0, 2, 2, 3)], (False, True)) for one in ALL},
)
def test_nothing_to_gather(impl: Impl, shape: tuple[int, int, int, int, int], per_image: bool) -> None:
    *sizes, count = shape
    leaf = torch.randn(sizes).requires_grad_()
    positions = torch.zeros((sizes[0], count) if per_image else (count,), dtype=torch.int64)
    vectors = gather_positions(leaf, positions, normalize=True, impl=impl)
    assert vectors.shape == (count, sizes[0], sizes[1])
    (gradient,) = torch.autograd.grad(vectors.sum(), leaf)
    assert torch.equal(gradient, torch.zeros(sizes))


@each(*ALL)
def test_derivatives_of_a_gather_with_positions_for_each_image(impl: Impl) -> None:
    feature_map, positions = draw(2, 3, 2, 3, dtype=F64).requires_grad_(), torch.tensor([[1, 1], [4, 0]])
    for normalize in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, n=normalize: gather_positions(x, positions, normalize=n, impl=impl), feature_map
        )


@each(*ALL)
def test_positions_for_each_image_are_gathered_with_the_same_bits_again(impl: Impl) -> None:
    inputs = [draw(5, 100, 6, 6), positions_in(36, 5, 70)]
    first, second = (
        gradients(lambda x, p: gather_positions(x, p, normalize=True, impl=impl), inputs) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@cases("dtype, shape", {NATIVE: product(NATIVE.dtypes, [(1, 2, 1), (2, 17, 33), (9, 40, 300), (1, 130, 70)])})
def test_variance_within_budget(impl: Impl, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    def plain(x: Tensor) -> Tensor:
        return R.variance_hinge(x if x.dtype == F64 else x.float(), 1.1, 1e-4)

    compare(lambda x: variance_hinge(x, gamma=1.1, reduction="none", impl=impl), plain, [draw(*shape, dtype=dtype)])


@cases("offset", {NATIVE: [(1e3,), (1e5,)]})
def test_variance_far_from_zero_within_budget(impl: Impl, offset: float) -> None:
    """A mean that is much larger than the deviation costs nothing: the squares are of centred numbers."""
    compare(
        lambda x: variance_hinge(x, gamma=3.0, reduction="none", impl=impl),
        lambda x: R.variance_hinge(x, 3.0),
        [draw(2, 200, 20) + offset],
    )


@each(*ALL)
def test_variance_of_equal_rows_and_of_wide_ones(impl: Impl) -> None:
    """Zero variance: the hinge is gamma − sqrt(eps), without a gradient. Beyond gamma: no loss and no gradient."""
    for scale, expected in ((0.0, 1 - 1e-2), (50.0, 0.0)):
        leaf = (draw(1, 30, 4) * scale).requires_grad_()
        loss = variance_hinge(leaf, impl=impl)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        assert bool((gradient == 0).all())


@each(*ALL)
def test_nan_reaches_its_group_only(impl: Impl) -> None:
    x = draw(2, 5, 4)
    x[0, 2, 1] = torch.nan
    loss = variance_hinge(x, reduction="none", impl=impl)
    assert loss.isnan().tolist() == [True, False]


@each(*ALL)
def test_second_derivatives_of_one_group_of_rows(impl: Impl) -> None:
    rows = draw(1, 4, 3, dtype=F64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: variance_hinge(x, gamma=2.0, impl=impl), rows)


@each(*ALL)
def test_gather_and_variance_compile_into_one_graph(impl: Impl) -> None:
    """As a training step calls them."""

    def chain(feature_map: Tensor, positions: Tensor) -> Tensor:
        vectors = gather_positions(feature_map, positions, normalize=True, impl=impl)
        return variance_hinge(vectors, gamma=0.5, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    inputs = [draw(3, 7, 4, 4), positions_in(16, 5)]
    assert_same_values(gradients(compiled, inputs), gradients(chain, inputs), impl)


@cases(
    "dtype, per_image, layout",
    {
        one: product([t for t in (BF16, F16) if t in one.dtypes], (False, True), ("contiguous", "channels_last"))
        for one in ALL
    },
)
def test_gradients_of_repeated_positions_are_summed_in_float32(
    impl: Impl, dtype: torch.dtype, per_image: bool, layout: str
) -> None:
    """A sum of ones kept in bfloat16 stops at 256, in float16 at 2048."""
    positions = torch.zeros(2, 3000, dtype=torch.int64)
    positions[:, 1::3] = 3
    feature_map = LAYOUTS[layout](torch.ones(2, 5, 2, 2, dtype=dtype)).requires_grad_()
    vectors = gather_positions(feature_map, positions if per_image else positions[0], impl=impl)
    (gradient,) = torch.autograd.grad(vectors.sum(), feature_map)
    assert torch.equal(gradient.flatten(2), torch.tensor([2000.0, 0, 0, 1000]).to(dtype).expand(2, 5, 4))


@each(*ALL)
def test_vectors_whose_squares_overflow_have_unit_length(impl: Impl) -> None:
    for dtype, scale in ((F32, 1e25), (BF16, 1e25)):
        feature_map = (draw(2, 6, 2, 2) * scale).to(dtype)
        vectors = gather_positions(feature_map, torch.arange(4), normalize=True, impl=impl)
        torch.testing.assert_close(vectors.float().norm(dim=-1), torch.ones(4, 2), rtol=0.01, atol=0)
