"""The two strided convolutions of a residual block by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.functional import downsample
from anomem.rules import Impl
from anomem.testing import compare, draw
from tests.operators.contract import BF16, F32, NATIVE, REFERENCE, Contract, assert_same_bits, cases, each

ALL = (REFERENCE, NATIVE)
OPERATORS = torch.ops.anomem


def channels_last(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def weights(channels: int, branch: int, straight: int, dtype: torch.dtype = F32) -> list[Tensor]:
    return [
        draw(branch, channels, 3, 3, dtype=dtype, seed=5),
        draw(straight, channels, 1, 1, dtype=dtype, seed=6),
    ]


class TestDownsample(Contract):
    """Rows are images."""

    implementations = ALL
    own_products = False

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 3, 5, 4, dtype=dtype), *weights(3, 2, 4, dtype)]

    def call(self, impl: Impl, x: Any, weight: Any, shortcut: Any) -> tuple[Tensor, Tensor]:
        return downsample(x, weight, shortcut, impl=impl)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        for height, width in ((5, 4), (1, 1)):
            x = channels_last(2, 3, height, width)
            yield OPERATORS.native_downsample_take, (x,)
            sampled = OPERATORS.native_downsample_take(x)
            yield OPERATORS.native_downsample_add, (channels_last(2, 3, height, width, seed=1), sampled)


# B, C, H, W, C', C'': odd sides, one row, column or pixel, one channel, less and more than a vector of channels.
SHAPES = [
    (2, 1, 1, 1, 1, 1), (3, 1, 5, 6, 2, 3), (2, 5, 1, 7, 4, 4), (2, 3, 8, 1, 5, 1), (4, 16, 9, 7, 16, 16),
    (2, 32, 6, 6, 8, 24), (2, 64, 4, 5, 8, 8), (3, 20, 7, 8, 3, 9), (1, 131, 3, 4, 2, 2),
]  # fmt: skip

# torch's own bfloat16 gradient of the weight reads memory that was never written where W = 1 (2.14).
OF_EACH_DTYPE = [(dtype, shape) for dtype, shape in product(NATIVE.dtypes, SHAPES) if dtype != BF16 or shape[3] > 1]


@cases("dtype, shape", {NATIVE: OF_EACH_DTYPE})
def test_any_shape_is_within_budget(impl: Impl, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, channels, height, width, *outputs = shape
    x = channels_last(batch, channels, height, width, dtype=dtype)
    inputs = [x, *weights(channels, *outputs, dtype)]
    compare(lambda *given: downsample(*given, impl=impl), R.downsample, inputs)


@cases("dtype, shape", {NATIVE: product(NATIVE.dtypes, [(0, 3, 4, 4), *(shape[:4] for shape in SHAPES)])})
def test_the_sample_and_its_gradient_are_those_of_a_slice(
    impl: Impl, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    downsample(draw(1, 1, 1, 1), *weights(1, 1, 1), impl=impl)  # registers the operators
    x, before = (channels_last(*shape, dtype=dtype, seed=seed) for seed in range(2))
    if x.numel() > 0:
        x[0, 0, 0, 0] = torch.nan
    sampled = OPERATORS.native_downsample_take(x)
    torch.testing.assert_close(sampled, x[:, :, ::2, ::2], rtol=0, atol=0, equal_nan=True)
    after = before.clone(memory_format=torch.channels_last)
    OPERATORS.native_downsample_add(after, sampled)
    before[:, :, ::2, ::2] += sampled
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def leaves_of(wanted: tuple[bool, ...], dtype: torch.dtype = F32) -> list[Tensor]:
    tensors = [channels_last(3, 6, 5, 8, dtype=dtype), *weights(6, 4, 7, dtype)]
    return [x.requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]


@each(NATIVE)
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_in_part(impl: Impl, used: tuple[bool, bool]) -> None:
    """Of frozen weights, of an input without gradient, and of one result alone."""

    def run(name: Impl, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        leaves = leaves_of(wanted)
        outputs = downsample(*leaves, impl=name)
        total = sum(out.square().sum() for out, use in zip(outputs, used, strict=True) if use)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
        return [leaf.grad for leaf in leaves]

    for wanted in product((False, True), repeat=3):
        for mine, theirs in zip(run(impl, wanted), run("reference", wanted), strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs)


@each(NATIVE)
def test_autocast_casts_once(impl: Impl) -> None:
    """Results and gradients of float32 leaves have the bits of a call with leaves cast by hand."""

    def run(cast: bool) -> list[Tensor]:
        leaves = leaves_of((True, True, True))
        with torch.autocast("cpu", dtype=BF16, enabled=cast):
            outputs = downsample(*(leaves if cast else [leaf.bfloat16() for leaf in leaves]), impl=impl)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])]

    first, second = run(True), run(False)
    assert [x.dtype for x in first] == [BF16, BF16, F32, F32, F32]
    assert_same_bits(first, second)


def kernels_of(x: Tensor, *parameters: Tensor, **options: Any) -> set[str]:
    with torch.profiler.profile() as profile:
        outputs = downsample(x, *parameters, **options)
        if outputs[0].requires_grad:
            sum(out.sum() for out in outputs).backward()
    return {event.key for event in profile.key_averages() if "native_downsample" in event.key}


def test_auto_takes_the_kernel_where_gradients_of_a_channels_last_map_are_wanted() -> None:
    x, parameters = draw(128, 16, 32, 32, dtype=BF16), weights(16, 16, 16, BF16)
    last = x.contiguous(memory_format=torch.channels_last)
    assert kernels_of(last, *parameters) == set()
    parameters[0].requires_grad_()
    assert kernels_of(last, *parameters) == {"anomem::native_downsample_take"}
    assert kernels_of(x, *parameters) == set()
    last.requires_grad_()
    assert kernels_of(last, *parameters) == {"anomem::native_downsample_take", "anomem::native_downsample_add"}
    with torch.no_grad():
        assert kernels_of(last, *parameters) == set()
        assert kernels_of(last, *parameters, impl="native", part=True) == set()
        assert kernels_of(last, *parameters, impl="native") == {"anomem::native_downsample_take"}


def test_without_a_gradient_it_is_torchs_own() -> None:
    x, parameters = channels_last(4, 16, 9, 8), weights(16, 8, 8)
    expected = F.conv2d(x, parameters[0], stride=2, padding=1), F.conv2d(x, parameters[1], stride=2)
    assert_same_bits(downsample(x, *parameters), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, "`x`: expected"),
        ({"x": torch.zeros(2, 3, 0, 4)}, "C, H and W ≥ 1"),
        ({"x": torch.zeros(2, 4, 4, 4)}, r"`weight`: expected \[C', 4, 3, 3\]"),
        ({"x": torch.zeros(2, 3, 4, 4).double()}, "`weight`: expected the dtype"),
        ({"weight": torch.zeros(5, 3, 3, 1)}, r"`weight`: expected \[C', 3, 3, 3\]"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, "C' ≥ 1"),
        ({"shortcut": torch.zeros(5, 3, 3, 3)}, r"`shortcut`: expected \[C', 3, 1, 1\]"),
        ({"shortcut": torch.zeros(5, 3)}, "`shortcut`: expected"),
        ({"shortcut": torch.zeros(5, 3, 1, 1).bfloat16()}, "`shortcut`: expected the dtype"),
        ({"impl": "triton"}, "no Triton kernel"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(5, 3, 3, 3)}
    arguments |= {"shortcut": torch.zeros(4, 3, 1, 1)} | change
    with pytest.raises(ArgumentError, match=message):
        downsample(**arguments)
