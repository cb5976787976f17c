"""The 3×3 convolution of stride 1 by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomem import machine
from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.functional import conv3x3
from anomem.ops.conv3x3 import makes_forward
from anomem.rules import Impl
from anomem.testing import compare, draw, gradients
from tests.operators.contract import BF16, F32, NATIVE, REFERENCE, Contract, assert_same_bits, cases, each

ALL = (REFERENCE, NATIVE)
OPERATORS = torch.ops.anomem


def channels_last(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def taps(channels: int, channels_out: int, dtype: torch.dtype = F32) -> Tensor:
    return draw(channels_out, channels, 3, 3, dtype=dtype, seed=5)


class TestConv3x3(Contract):
    """Rows are images."""

    implementations = ALL

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return [draw(rows, 3, 5, 4, dtype=dtype), taps(3, 2, dtype)]

    def call(self, impl: Impl, x: Any, weight: Any) -> Tensor:
        return conv3x3(x, weight, impl=impl)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        for height, width in ((5, 4), (1, 1)):
            x, grad = channels_last(2, 3, height, width), channels_last(2, 6, height, width)
            weight = channels_last(6, 3, 3, 3, seed=1)
            yield OPERATORS.native_conv3x3, (x, weight, False)
            yield OPERATORS.native_conv3x3, (grad, weight, True)
            yield OPERATORS.native_conv3x3_weight, (x, grad)
        # The fake cannot know the processor: in bfloat16 Python asks outside of traces.
        yield OPERATORS.native_conv3x3_direct, (channels_last(1, 1, 1, 1),)


# B, C, H, W, C': odd sides, one row, column or pixel, one channel, less and more than a vector or a panel of channels,
# more tiles than a block, more output channels than a slice of the weight's gradient.
SHAPES = [
    (2, 1, 1, 1, 1), (3, 1, 5, 6, 2), (2, 5, 1, 7, 4), (2, 3, 8, 1, 5), (4, 16, 9, 7, 16), (2, 32, 6, 6, 33),
    (2, 64, 4, 5, 8), (3, 20, 7, 8, 3), (1, 131, 3, 4, 2), (2, 17, 2, 2, 131), (9, 33, 16, 18, 35), (40, 64, 11, 6, 64),
]  # fmt: skip

# torch's own bfloat16 gradient of the weight reads memory that was never written where W = 1 (2.14).
OF_EACH_DTYPE = [(dtype, shape) for dtype, shape in product(NATIVE.dtypes, SHAPES) if dtype != BF16 or shape[3] > 1]


@cases("dtype, shape", {NATIVE: OF_EACH_DTYPE})
def test_any_shape_is_within_budget(impl: Impl, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, channels, height, width, channels_out = shape
    inputs = [channels_last(batch, channels, height, width, dtype=dtype), taps(channels, channels_out, dtype)]
    # Transforms add terms that cancel later: four times the usual band.
    compare(lambda *given: conv3x3(*given, impl=impl), R.conv3x3, inputs, ulps=16)


@pytest.fixture(params=[True, False], ids=["tiles", "no tiles"])
def direct(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether bfloat16 is convolved directly, on processors that multiply in tiles both ways."""
    with torch.backends.mkldnn.flags(enabled=request.param):
        if request.param and not makes_forward(BF16):
            pytest.skip("this processor does not multiply bfloat16 in tiles")
        yield request.param


# One pixel, row or column; channels and outputs beyond a panel, a step of the tiles and a slice; more windows than a
# block and more positions than a chain; unequal channels.
DIRECT_SHAPES = [
    (1, 1, 1, 1, 1), (1, 3, 1, 7, 5), (3, 33, 7, 1, 31), (2, 32, 2, 2, 65), (1, 130, 5, 3, 257), (2, 300, 7, 7, 40),
    (5, 64, 9, 13, 128), (130, 32, 8, 8, 36), (150, 40, 4, 4, 300), (70, 8, 13, 11, 8), (1, 8, 4, 700, 8),
]  # fmt: skip


@each(NATIVE)
@pytest.mark.parametrize("direct", [True], indirect=True)
@pytest.mark.parametrize("shape", DIRECT_SHAPES, ids=str)
def test_in_tiles_results_are_rounded_once(impl: Impl, direct: bool, shape: tuple[int, ...]) -> None:
    """Against float64: nothing but the last rounding and that of float32 sums."""
    batch, channels, height, width, channels_out = shape
    x = channels_last(batch, channels, height, width, dtype=BF16)
    inputs = [x, taps(channels, channels_out, BF16)]
    upstream = channels_last(batch, channels_out, height, width, dtype=BF16, seed=7)

    def both(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.to(dtype).requires_grad_() for leaf in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))]

    mine = both(lambda *given: conv3x3(*given, impl=impl), BF16)
    for actual, truth in zip(mine, both(R.conv3x3, torch.float64), strict=True):
        error = (actual.double() - truth).abs()
        assert bool((error <= 2**-8 * truth.abs() + 1e-5 * float(truth.abs().max())).all())


@each(NATIVE)
def test_no_images(impl: Impl, direct: bool) -> None:
    x, weight = channels_last(0, 33, 5, 4, dtype=BF16).requires_grad_(), taps(33, 6, BF16).requires_grad_()
    y = conv3x3(x, weight, impl=impl)
    assert y.shape == (0, 6, 5, 4)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert weight.grad is not None
    assert not weight.grad.any()


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@each(NATIVE)
@pytest.mark.parametrize(("dtype", "most"), [(F32, 4.0), (BF16, 4.0)], ids=str)
def test_the_error_is_of_the_size_of_a_direct_convolution_s(impl: Impl, dtype: torch.dtype, most: float) -> None:
    """Root mean squares over a whole map: a budget by the largest magnitude would allow a hundredth of it."""
    inputs = [channels_last(16, 64, 16, 16, dtype=dtype), taps(64, 64, dtype)]
    mine = gradients(lambda *given: conv3x3(*given, impl=impl), inputs)
    plain = gradients(R.conv3x3, inputs)
    exact = gradients(R.conv3x3, [x.double() for x in inputs])
    for actual, baseline, truth in zip(mine, plain, exact, strict=True):
        assert relative(actual, truth) < most * relative(baseline, truth)


@cases("dtype", {NATIVE: [(dtype,) for dtype in NATIVE.dtypes]})
def test_whole_numbers_are_exact(impl: Impl, dtype: torch.dtype) -> None:
    """Every transform and product of small multiples of 4 is exact in each dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (3, 6, 5, 7), generator=generator).to(dtype)
    weight = 4 * torch.randint(-1, 2, (4, 6, 3, 3), generator=generator).to(dtype)
    torch.testing.assert_close(
        conv3x3(x, weight, impl=impl), R.conv3x3(x.double(), weight.double()).to(dtype), rtol=0, atol=0
    )


@cases("dtype", {NATIVE: [(dtype,) for dtype in NATIVE.dtypes]})
def test_a_value_that_is_not_finite_stays_within_its_tiles(impl: Impl, dtype: torch.dtype) -> None:
    """It reaches its window, at most the other pixels of the tiles that read it, and no other image."""
    x, weight = channels_last(2, 3, 8, 8, dtype=dtype), taps(3, 2, dtype)
    x[0, 1, 2, 3] = torch.nan
    result = conv3x3(x, weight, impl=impl)
    assert result[0, :, 1:4, 2:5].isnan().all()
    assert result[1].isfinite().all()
    assert result[0, :, 4:].isfinite().all()
    assert result[0, :, :, 6:].isfinite().all()


@each(NATIVE)
@pytest.mark.parametrize("direct", [True], indirect=True)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_in_tiles_a_value_that_is_not_finite_reaches_its_window_alone(impl: Impl, direct: bool, value: float) -> None:
    x, weight = channels_last(2, 3, 8, 8, dtype=BF16), taps(3, 2, BF16)
    x[0, 1, 2, 3] = x[1, 0, 7, 7] = value
    expected = torch.ones(2, 8, 8, dtype=torch.bool)
    expected[0, 1:4, 2:5] = expected[1, 6:, 6:] = False
    x.requires_grad_()
    y = conv3x3(x, weight, impl=impl)
    assert torch.equal(y.isfinite().all(1), expected)
    assert torch.equal(y.isfinite().any(1), expected)
    (dx,) = torch.autograd.grad(y, x, x.detach()[:, :2].contiguous(memory_format=torch.channels_last))
    assert torch.equal(dx.isfinite().all(1), expected)


@each(NATIVE)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_gradients_in_part(impl: Impl, wanted: tuple[bool, bool]) -> None:
    def run(name: Impl) -> list[Tensor | None]:
        leaves = [
            x.requires_grad_(want) for x, want in zip((channels_last(3, 6, 5, 8), taps(6, 4)), wanted, strict=True)
        ]
        total = conv3x3(*leaves, impl=name).square().sum()
        if total.requires_grad:
            total.backward()
        return [leaf.grad for leaf in leaves]

    for mine, theirs in zip(run(impl), run("reference"), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@each(NATIVE)
def test_autocast_casts_once(impl: Impl) -> None:
    """Results and gradients of float32 leaves have the bits of a call with leaves cast by hand."""

    def run(cast: bool) -> list[Tensor]:
        leaves = [channels_last(3, 6, 5, 8).requires_grad_(), taps(6, 4).requires_grad_()]
        with torch.autocast("cpu", dtype=BF16, enabled=cast):
            out = conv3x3(*(leaves if cast else [leaf.bfloat16() for leaf in leaves]), impl=impl)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    first, second = run(True), run(False)
    assert [x.dtype for x in first] == [BF16, F32, F32]
    assert_same_bits(first, second)


def kernels_of(x: Tensor, weight: Tensor, **options: Any) -> set[str]:
    with torch.profiler.profile() as profile:
        out = conv3x3(x, weight, **options)
        if out.requires_grad:
            out.sum().backward()
    return {event.key for event in profile.key_averages() if "native_conv3x3" in event.key}


BOTH = {"anomem::native_conv3x3", "anomem::native_conv3x3_weight"}


def test_auto_takes_the_kernel_for_channels_last_maps_of_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "hardware", lambda device: "AuthenticAMD family 25 AVX512-BF16")
    x, weight = channels_last(32, 32, 16, 16), taps(32, 32)
    assert kernels_of(x, weight) == {"anomem::native_conv3x3"}
    assert kernels_of(x, weight.clone().requires_grad_()) == BOTH
    assert kernels_of(x.contiguous(), weight) == set()
    assert kernels_of(x.contiguous(), weight, impl="native", part=True) == set()
    assert kernels_of(x.contiguous(), weight, impl="native") == {"anomem::native_conv3x3"}
    assert kernels_of(x[:1], weight) == set()
    few = channels_last(64, 16, 16, 16)
    assert kernels_of(few, taps(16, 32)) == set()
    assert torch.equal(conv3x3(few, taps(16, 32)), F.conv2d(few, taps(16, 32), padding=1))


@pytest.mark.parametrize("direct", [False], indirect=True)
def test_in_bfloat16_the_kernel_makes_the_gradients(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    monkeypatch.setattr(machine, "hardware", lambda device: "AuthenticAMD family 25 AVX512-BF16")
    x, weight = channels_last(32, 32, 16, 16, dtype=BF16), taps(32, 32, BF16)
    expected = F.conv2d(x, weight, padding=1)
    assert kernels_of(x, weight) == set()
    leaves = x.clone(memory_format=torch.channels_last).requires_grad_(), weight.clone().requires_grad_()
    assert_same_bits([conv3x3(*leaves).detach(), conv3x3(x, weight, impl="native")], [expected, expected])
    assert kernels_of(x, leaves[1]) == {"anomem::native_conv3x3_weight"}
    assert kernels_of(*leaves) == BOTH


@pytest.mark.parametrize("direct", [True], indirect=True)
def test_in_tiles_the_kernel_makes_both_passes(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    monkeypatch.setattr(machine, "hardware", lambda device: "AuthenticAMD family 25 AVX512-BF16")
    x, weight = channels_last(32, 32, 16, 16, dtype=BF16), taps(32, 32, BF16)
    assert kernels_of(x, weight) == set()  # without gradients torch's is as fast
    assert kernels_of(x, weight.clone().requires_grad_()) == BOTH
    leaf = weight.clone().requires_grad_()
    compiled = torch.compile(conv3x3, fullgraph=True, backend="eager")
    # Compiled by torch 2.11 some results differ in the last bit.
    torch.testing.assert_close(compiled(x, leaf), conv3x3(x, leaf), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(64, 512, 1, 16), (64, 512, 16, 1)], ids=str)
def test_maps_of_one_row_or_column_are_torch_s(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The kernel was up to five times as slow there."""
    x = channels_last(*shape, dtype=dtype).requires_grad_()
    assert kernels_of(x, taps(512, 512, dtype)) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, "`x`: expected"),
        ({"x": torch.zeros(2, 3, 0, 4)}, "C, H and W ≥ 1"),
        ({"x": torch.zeros(2, 4, 4, 4)}, r"`weight`: expected \[C', 4, 3, 3\]"),
        ({"x": torch.zeros(2, 3, 4, 4).double()}, "`weight`: expected the dtype"),
        ({"weight": torch.zeros(5, 3, 3, 1)}, r"`weight`: expected \[C', 3, 3, 3\]"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, "C' ≥ 1"),
        ({"impl": "triton"}, "no Triton kernel"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(5, 3, 3, 3)}
    with pytest.raises(ArgumentError, match=message):
        conv3x3(**(arguments | change))
