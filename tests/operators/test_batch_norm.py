"""Batch norm with a sum and a ReLU by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.functional import batch_norm
from anomem.nn import BatchNorm2d
from anomem.rules import Impl
from anomem.testing import compare, draw, gradients
from tests.operators.contract import F32, F64, NATIVE, REFERENCE, Contract, cases, each

ALL = (REFERENCE, NATIVE)
OPERATORS = torch.ops.anomem


def channels_last(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


class TestBatchNorm(Contract):
    """Rows are images."""

    implementations = ALL
    cast = False
    relu = False

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 3, 2, 2, dtype=dtype)]

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(3, dtype=dtype, seed=5), draw(3, dtype=dtype, seed=6)]

    def call(self, impl: Impl, x: Any, *parameters: Any) -> Tensor:
        weight, bias = parameters or (None, None)
        return batch_norm(x, None, None, weight, bias, True, relu=self.relu, impl=impl)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        x, add, dout = (channels_last(4, 5, 3, 2, seed=seed) for seed in range(3))
        numbers = draw(5, seed=4), draw(5, seed=5)
        yield OPERATORS.native_batch_norm_statistics, (x,)
        statistics = OPERATORS.native_batch_norm_statistics(x)
        yield OPERATORS.native_batch_norm_apply, (x, *statistics, *numbers, add, 1e-5, True)
        out = OPERATORS.native_batch_norm_apply(x, *statistics, *numbers, add, 1e-5, True)
        for kept, affine in ((out, numbers), (None, (None, None))):
            yield OPERATORS.native_batch_norm_sums, (dout, x, kept, *statistics, *affine, 1e-5, True)
            sums = OPERATORS.native_batch_norm_sums(dout, x, kept, *statistics, *affine, 1e-5, True)
            added = kept is not None
            arguments = (dout, x, kept, *statistics, *affine, *sums, 24, 1e-5, True, added)
            yield OPERATORS.native_batch_norm_gradient, arguments


class TestBatchNormAndReLU(TestBatchNorm):
    """The ReLU in it."""

    relu = True


class TestBatchNormAndSum(TestBatchNorm):
    """The end of a residual branch."""

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 3, 2, 2, dtype=dtype), draw(rows, 3, 2, 2, dtype=dtype, seed=1)]

    def call(self, impl: Impl, x: Any, add: Any, *parameters: Any) -> Tensor:
        weight, bias = parameters or (None, None)
        return batch_norm(x, None, None, weight, bias, True, add=add, relu=self.relu, impl=impl)


class TestBatchNormSumAndReLU(TestBatchNormAndSum):
    """The end of a residual branch with an activation."""

    relu = True


# B, C, H, W: rows joined to wide ones (1 to 64 channels), tails of a chunk and of a vector, several pieces.
SHAPES = [
    (2, 1, 1, 2), (3, 5, 4, 7), (9, 16, 7, 5), (70, 8, 9, 11), (5, 32, 3, 3), (6, 64, 5, 5), (7, 96, 4, 5),
    (3, 300, 4, 4), (40, 16, 33, 31),
]  # fmt: skip


@cases("dtype, relu, added, shape", {NATIVE: product(NATIVE.dtypes, (False, True), (False, True), SHAPES)})
def test_any_shape_is_within_budget(
    impl: Impl, dtype: torch.dtype, relu: bool, added: bool, shape: tuple[int, int, int, int]
) -> None:
    x, add = (channels_last(*shape, dtype=dtype, seed=seed) for seed in range(2))
    weight, bias = (draw(shape[1], dtype=F64 if dtype == F64 else F32, seed=seed) for seed in (2, 3))

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, *add: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, True, add=add[0] if add else None, relu=relu, impl=impl)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, *add: Tensor) -> Tensor:
        if dtype != F64:
            return R.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5, add=add[0] if add else None, relu=relu)
        # torch's own is a dozen units off in float64 gradients: its sums are not pairwise.
        mean, variance, _ = R.joint_moments(x, lambda mine: mine[None])
        total = R.normalised_by(x, mean, variance, weight, bias, 1e-5) + (add[0] if add else 0)
        return total.relu() if relu else total

    compare(kernel, plain, [x, weight, bias, *([add] if added else [])])


@each(*ALL)
def test_a_large_mean_costs_no_digits(impl: Impl) -> None:
    """Squares of 1e4 ± 1 would leave three digits of the variance."""
    x = channels_last(60, 16, 20, 20) + 1e4
    compare(
        lambda x: batch_norm(x, training=True, impl=impl), lambda x: R.batch_norm(x, *[None] * 4, True, 0.0, 1e-5), [x]
    )


@each(NATIVE)
def test_running_statistics_are_those_of_torch(impl: Impl) -> None:
    mine, theirs = BatchNorm2d(6, impl=impl), nn.BatchNorm2d(6)
    for step in range(3):
        x = 3 + 2 * channels_last(4, 6, 5, 5, seed=step)
        mine(x), theirs(x)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value)
    mine.eval(), theirs.eval()
    x, add = channels_last(3, 6, 4, 4), channels_last(3, 6, 4, 4, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(mine(x, add), theirs(x) + add)
    mine.relu = True
    torch.testing.assert_close(mine(x, add), (theirs(x) + add).relu())  # with a gradient


@each(*ALL)
@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_options_of_the_layer_are_those_of_torch(impl: Impl, options: dict[str, Any]) -> None:
    mine, theirs = BatchNorm2d(3, impl=impl, **options), nn.BatchNorm2d(3, **options)
    for step in range(2):
        x = 1 + channels_last(4, 3, 5, 5, seed=step)
        torch.testing.assert_close(mine(x), theirs(x))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


@each(NATIVE)
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 2, 3, 2)])
def test_maps_of_any_number_of_axes(impl: Impl, shape: tuple[int, ...]) -> None:
    x, add = draw(*shape), draw(*shape, seed=1)
    compare(
        lambda x, add: batch_norm(x, training=True, add=add, relu=True, impl=impl),
        lambda x, add: R.batch_norm(x, *[None] * 4, True, 0.0, 1e-5, add=add, relu=True),
        [x, add],
    )


@each(NATIVE)
def test_gradients_in_part(impl: Impl) -> None:
    """Each input alone, as with frozen layers."""
    tensors = [channels_last(4, 5, 3, 3), draw(5, seed=1), draw(5, seed=2), channels_last(4, 5, 3, 3, seed=3)]

    def run(name: Impl, wanted: int) -> Tensor:
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
        x, weight, bias, add = leaves
        batch_norm(x, None, None, weight, bias, True, add=add, relu=True, impl=name).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(4)]
        return leaves[wanted].grad

    for wanted in range(4):
        torch.testing.assert_close(run(impl, wanted), run("reference", wanted))


@each(NATIVE)
def test_values_that_are_not_finite(impl: Impl) -> None:
    """They make their own channel NaN, as in torch; a ReLU keeps NaN."""
    x = channels_last(4, 20, 3, 3)
    x[0, 3, 0, 0], x[1, 17, 1, 1] = torch.nan, torch.inf
    got, expected = (batch_norm(x, training=True, relu=True, impl=name) for name in (impl, "reference"))
    assert torch.equal(got.isnan(), expected.isnan())
    assert int(got.isnan().any(dim=(0, 2, 3)).sum()) == 2


def test_auto_takes_the_kernel_for_channels_last_maps_alone() -> None:
    def operators_of(x: Tensor) -> set[str]:
        with torch.profiler.profile() as profile:
            batch_norm(x, training=True)
        return {event.key for event in profile.key_averages() if "batch_norm" in event.key}

    x = draw(16, 8, 12, 12)
    assert any("native_batch_norm_apply" in name for name in operators_of(x.to(memory_format=torch.channels_last)))
    assert not any("anomem" in name for name in operators_of(x))
    every_other = draw(4, 8, 48, 48).to(memory_format=torch.channels_last)[::2]
    assert not any("anomem" in name for name in operators_of(every_other))
    assert any("native_batch_norm_apply" in name for name in operators_of(every_other[:1]))  # one image has no stride


@each(NATIVE)
def test_a_relu_in_place_behind_it(impl: Impl) -> None:
    """As in torchvision's networks: the gradient takes no detour through a view."""
    x = channels_last(4, 5, 6, 6).requires_grad_()
    out = nn.ReLU(inplace=True)(BatchNorm2d(5, impl=impl)(x))
    (before, _), *_ = out.grad_fn.next_functions
    assert before.name() == "_BatchNormBackward"

    def plain(x: Tensor) -> Tensor:
        return R.batch_norm(x, *[None] * 4, True, 0.0, 1e-5).relu()

    compare(lambda x: batch_norm(x, training=True, impl=impl).relu_(), plain, [x.detach()])


def test_a_frozen_batch_norm_has_torchs_gradient() -> None:
    norm, theirs = BatchNorm2d(4, relu=True).eval(), nn.BatchNorm2d(4).eval()
    x = channels_last(3, 4, 5, 5)
    got, expected = (gradients(one, [x]) for one in (norm, lambda x: theirs(x).relu()))
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "`x`: expected"),
        ({"x": torch.zeros(1, 3, 1, 1)}, "more than one value per channel"),
        ({"weight": torch.ones(2)}, r"`weight`: expected \[3\]"),
        ({"bias": torch.ones(3, 1)}, r"`bias`: expected \[3\]"),
        ({"add": torch.zeros(2, 3, 4, 5)}, "`add`: expected the shape"),
        ({"add": torch.zeros(2, 3, 4, 4).double()}, "`add`: expected"),
        ({"training": False}, "`running_mean`: expected running statistics"),
        ({"impl": "triton"}, "no Triton kernel"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4, 4), "training": True} | change
    with pytest.raises(ArgumentError, match=message):
        batch_norm(**arguments)
