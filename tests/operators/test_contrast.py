"""NT-Xent and its rectangular form, InfoNCE, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.functional import info_nce, nt_xent
from anomem.ops import contrast as ops_contrast
from anomem.rules import Impl
from anomem.testing import assert_within_budget, compare, draw, error, gradients
from tests.operators.contract import (
    BF16,
    F16,
    F32,
    F64,
    NATIVE,
    REFERENCE,
    TRITON,
    Contract,
    Function,
    cases,
    each,
    each_dtype,
)

ALL = (REFERENCE, NATIVE, TRITON)
KERNELS = (NATIVE, TRITON)
OPERATORS = torch.ops.anomem
PASSES = ("fwd", "bwd")


def rows_of(impl: Impl, tau: float = 0.2) -> Function:
    return lambda z, z_pair: nt_xent(z, z_pair, temperature=tau, reduction="none", impl=impl)


def plain_rows(tau: float = 0.2) -> Function:
    return lambda z, z_pair: R.nt_xent_rows(z, z_pair, tau)


def check(impl: Impl, tau: float, inputs: list[Tensor]) -> None:
    """NT-Xent's losses and gradients within the budget."""
    compare(rows_of(impl, tau), plain_rows(tau), inputs)


def views(groups: int, batch: int, features: int, dtype: torch.dtype = F32, seed: int = 0) -> list[Tensor]:
    return [draw(groups, batch, features, dtype=dtype, seed=seed + i) for i in range(2)]


class TestNTXent(Contract):
    """Rows are pairs of a batch."""

    implementations = ALL
    many = 17  # of 34 rows

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        return views(2, rows, 6, dtype)

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        return [torch.tensor(0.2, dtype=F64 if dtype == F64 else F32)]

    def call(self, impl: Impl, *inputs: Any) -> Tensor:
        z, z_pair, *temperature = inputs
        return nt_xent(z, z_pair, temperature=temperature[0] if temperature else 0.3, reduction="none", impl=impl)

    def plain(self, impl: Impl, *inputs: Any) -> Tensor:
        return R.nt_xent_rows(*inputs, 0.3)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        z, z_pair = views(2, 5, 4)
        forward, backward = (getattr(OPERATORS, f"{impl}_nt_xent_{direction}") for direction in ("fwd", "bwd"))
        for temperature in (None, torch.tensor(0.3)):
            arguments = (z, z_pair, temperature, 0.2)
            yield forward, arguments
            outputs = forward(*arguments)
            inputs = (z, z_pair) if impl == "native" else ()
            features = () if impl == "native" else (4,)
            yield backward, (torch.ones_like(outputs[0]), *inputs, *outputs, temperature, 0.2, *features)
            if impl == "native":
                outputs = OPERATORS.native_nt_xent_kept_fwd(*arguments, 1)
                given = (torch.ones_like(outputs[0]), z, z_pair, *outputs, temperature, 0.2)
                yield OPERATORS.native_nt_xent_kept_bwd, given


class TestInfoNCE(Contract):
    """Each row with a column to find and one that it does not see."""

    implementations = ALL

    def inputs(self, rows: int, dtype: torch.dtype = F32) -> list[Tensor]:
        positive = torch.arange(rows) % 7
        return [draw(2, rows, 6, dtype=dtype), draw(2, 7, 6, dtype=dtype, seed=1), positive, (positive + 1) % 7]

    def parameters(self, dtype: torch.dtype = F32) -> list[Tensor]:
        return [torch.tensor(0.3, dtype=F64 if dtype == F64 else F32)]

    def call(self, impl: Impl, *inputs: Any) -> Tensor:
        rows, columns, positive, exclude, *temperature = inputs
        tau = temperature[0] if temperature else 0.2
        return info_nce(rows, columns, positive, exclude, temperature=tau, reduction="none", impl=impl)

    def plain(self, impl: Impl, *inputs: Any) -> Tensor:
        return R.info_nce_rows(*inputs, 0.2)

    def operator_calls(self, impl: Impl) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        rows, columns, positive = draw(2, 4, 3), draw(2, 5, 3, seed=1), torch.tensor([0, 1, 2, 4])
        forward, backward = (getattr(OPERATORS, f"{impl}_info_nce_{direction}") for direction in ("fwd", "bwd"))
        for exclude, temperature in ((None, None), ((positive + 1) % 5, torch.tensor(0.3))):
            rest = (positive, exclude, temperature, 0.2)
            yield forward, (rows, columns, *rest)
            outputs = forward(rows, columns, *rest)
            inputs = (rows, columns) if impl == "native" else ()
            features = () if impl == "native" else (3,)
            yield backward, (torch.ones_like(outputs[0]), *inputs, *outputs, *rest, *features)
            if impl == "native":
                outputs = OPERATORS.native_info_nce_kept_fwd(rows, columns, *rest, 2)
                given = (torch.ones_like(outputs[0]), rows, columns, *outputs, *rest)
                yield OPERATORS.native_info_nce_kept_bwd, given


TAUS = [0.005, 0.022, 0.023, 0.2, 10.0]
NATIVE_SHAPES = [(1, 1, 3), (4, 2, 5), (2, 3, 7), (1, 16, 33), (3, 65, 17), (2, 200, 40), (1, 300, 130), (16, 9, 64)]
TRITON_SHAPES = [(1, 33, 40), (3, 7, 16), (1, 2, 16), (2, 1, 16)]
MANY_TILES = [(1, 35, 128), (1, 6, 300), (1, 70, 16), (1, 70, 130)]  # and slices of features, and chunks of rows


@cases(
    "dtype, tau, shape",
    {
        NATIVE: product((F32, BF16), TAUS, NATIVE_SHAPES),
        TRITON: [*product(TRITON.dtypes, TAUS, TRITON_SHAPES), *product(TRITON.dtypes, (0.2,), MANY_TILES)],
    },
)
def test_nt_xent_within_budget(impl: Impl, dtype: torch.dtype, tau: float, shape: tuple[int, int, int]) -> None:
    check(impl, tau, views(*shape, dtype))


# Triton: fewer pairs of fewer features, so that negatives are near. Where all losses are 0 the error is luck.
@cases(
    "tau, n, d",
    {one: [(tau, n, d) for tau in (0.005, 0.022, 0.03, 0.07)] for one, n, d in ((NATIVE, 200, 40), (TRITON, 35, 8))},
)
def test_well_matched_pairs_within_budget(impl: Impl, tau: float, n: int, d: int) -> None:
    """Where the positive dominates its row, the loss is what is left of two large numbers."""
    z, noise = views(2, n, d, seed=1)
    check(impl, tau, [z, z + 0.05 * noise])


@cases("dtype, tau", {one: product([t for t in (F32, BF16, F16) if t in one.dtypes], [0.01, 0.3]) for one in KERNELS})
def test_learned_temperature_of_nt_xent_within_budget(impl: Impl, dtype: torch.dtype, tau: float) -> None:
    """A temperature for each of four batches: over a single number plain PyTorch's error would be a matter of luck."""

    def several(loss: Function) -> Function:
        return lambda a, b, t: torch.cat([loss(a[[k]], b[[k]], t[k]) for k in range(4)])

    compare(
        several(lambda a, b, t: nt_xent(a, b, temperature=t, reduction="none", impl=impl)),
        several(R.nt_xent_rows),
        [*views(4, 17, 40, dtype), torch.full((4,), tau)],
    )


KEPT_SHAPES = [(5, 80, 128), (1, 150, 130), (3, 9, 17)]


@cases("dtype, tau, shape", {NATIVE: product((F32, BF16, F64), (0.01, 0.2), KEPT_SHAPES)})
def test_kept_products_are_those_that_would_be_made_again(
    impl: Impl, dtype: torch.dtype, tau: float, shape: tuple[int, int, int]
) -> None:
    groups, batch, features = shape
    z, z_pair = views(*shape, dtype)
    columns = draw(groups, 2 * batch + 3, features, dtype=dtype, seed=5)
    index = (torch.arange(batch) * 3 % columns.shape[1], torch.arange(batch))
    rest = (torch.tensor(tau, dtype=F64 if dtype == F64 else F32), 1.0)

    def slopes(kept: tuple[int, int] | None) -> list[Tensor]:
        infix, of_pairs, of_columns = ("", (), ()) if kept is None else ("kept_", kept[:1], kept[1:])
        of = {f"{o}_{p}": getattr(OPERATORS, f"{impl}_{o}_{infix}{p}") for o in ("nt_xent", "info_nce") for p in PASSES}
        results = of["nt_xent_fwd"](z, z_pair, *rest, *of_pairs)
        drows = draw(groups, 2 * batch, dtype=results[0].dtype, seed=7)
        found = [*results[:3], *of["nt_xent_bwd"](drows, z, z_pair, *results, *rest)]
        results = of["info_nce_fwd"](z, columns, *index, *rest, *of_columns)
        dloss = drows[:, :batch].contiguous()
        return [*found, *results[:4], *of["info_nce_bwd"](dloss, z, columns, *results, *index, *rest)]

    again = slopes(None)
    pairs = groups * ops_contrast._nt_xent_tiles(2 * batch, groups)[0]
    crossings = groups * ops_contrast._info_nce_tiles(batch, columns.shape[1], groups)[0]
    for kept in ((0, 0), (1, 1), (pairs // 2, crossings // 2), (pairs - 1, crossings - 1), (pairs, crossings)):
        for one, other in zip(slopes(kept), again, strict=True):
            assert torch.equal(one, other)


@each(NATIVE)
def test_operators_that_keep_products_keep_their_schemas(impl: Impl) -> None:
    """Without a comparison of values: the products below a tile's diagonal are never written."""
    z, z_pair = views(3, 70, 16)
    rows_of(impl)(z, z_pair)  # registers the operators
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS.native_nt_xent_kept_fwd.default, (z, z_pair, None, 0.2, 2), test_utils=checks)
    index = torch.arange(70)
    given = (z, z_pair, index, index.roll(1), None, 0.2, 2)
    torch.library.opcheck(OPERATORS.native_info_nce_kept_fwd.default, given, test_utils=checks)


@each_dtype(NATIVE, among=(F32, BF16))
def test_kept_products_are_bounded_and_wanted_by_gradients_alone(
    impl: Impl, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = 64 * 80 * 4  # bytes of 64 rows each way, in float32; a group has three rows of tiles, six pairs
    inputs = views(3, 90, 128, dtype)
    for most, kept in ((0, 0), (15 * tile + 1, 15), (2**30, 18)):
        share = 2 if dtype == BF16 else 1  # of so few features
        monkeypatch.setattr(ops_contrast, "KEPT_BYTES", share * most)
        saved: list[Tensor] = []
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=saved: to.append(x) or x, lambda x: x):
            rows_of(impl)(*inputs)
            assert not saved
            rows_of(impl)(*leaves)
        assert sum(x.nbytes for x in saved if x.shape[-1] == tile // 4) == kept * tile
        check(impl, 0.2, inputs)
    monkeypatch.setattr(ops_contrast, "KEPT_BYTES", 2**30)
    positive = torch.arange(130) % 70
    compare(
        lambda a, b: info_nce(a, b, positive, temperature=0.2, reduction="none", impl=impl),
        lambda a, b: R.info_nce_rows(a, b, positive, None, 0.2),
        [draw(2, 130, 128, dtype=dtype), draw(2, 70, 128, dtype=dtype, seed=1)],
    )


@each(*KERNELS)
def test_one_learned_temperature_of_all_groups_within_budget(impl: Impl) -> None:
    compare(
        lambda a, b, t: nt_xent(a, b, temperature=t, reduction="none", impl=impl),
        R.nt_xent_rows,
        [*views(2, 40, 16, seed=1), torch.tensor(0.1)],
    )


@cases(
    "dtype, tau, shape",
    {
        one: product(dtypes, [0.005, 0.2], [(1, 33, 40), (1, 2, 16), (1, 2, 128)])
        for one, dtypes in ((NATIVE, (BF16,)), (TRITON, (BF16, F16)))
    },
)
def test_losses_of_short_floats_are_as_exact_as_in_float32(
    impl: Impl, dtype: torch.dtype, tau: float, shape: tuple[int, int, int]
) -> None:
    z, z_pair = views(*shape, dtype)
    plain, exact = (R.nt_xent_rows(z.to(wide), z_pair.to(wide), tau) for wide in (F32, F64))
    assert_within_budget(rows_of(impl, tau)(z, z_pair), plain, exact)
    rounded = [R.l2_normalize(x.float()).to(dtype).float() for x in (z, z_pair)]
    with pytest.raises(AssertionError, match=r"error .* of the largest magnitude"):
        assert_within_budget(R.nt_xent_rows(*rounded, tau), plain, exact)


@cases(
    "dtype, length", {one: product([t for t in (F32, BF16, F16) if t in one.dtypes], [1e-3, 1e4]) for one in KERNELS}
)
def test_the_lengths_of_the_rows_do_not_matter(impl: Impl, dtype: torch.dtype, length: float) -> None:
    z, z_pair = views(1, 9, 16, dtype)
    z[:, ::2] *= length
    check(impl, 0.2, [z, z_pair])


@cases(
    "scale, n",
    {one: [(s, n) for s in (1e-30, 1e-9, 1.0, 1e18, 1e30)] for one, n in ((NATIVE, 70), (TRITON, 17))},
)
def test_bfloat16_rows_of_any_length_within_budget(impl: Impl, scale: float, n: int) -> None:
    """Products of bfloat16 read rows at a power of two, in which rows that are long or short must stay what they are.

    Rows shorter than 1e-12 are nothing: theirs are all losses of equal logits.
    """
    check(impl, 0.1, [draw(2, n, 33, dtype=BF16, seed=1, scale=scale), draw(2, n, 33, dtype=BF16, seed=2)])


@cases("spread, n", {one: [(spread, n) for spread in (0.3, 0.03)] for one, n in ((NATIVE, 150), (TRITON, 35))})
def test_bfloat16_rows_that_are_nearly_one_within_budget(impl: Impl, spread: float, n: int) -> None:
    """A collapsed representation: gradients are what is left where nearly equal rows cancel."""
    common = draw(33, seed=3)
    check(impl, 0.1, [(common + spread * x.float()).bfloat16() for x in views(2, n, 33, seed=1)])


@cases("batch, d", {NATIVE: [(4096, 8)], TRITON: [(128, 8)]})
def test_rounding_does_not_grow_with_the_batch(impl: Impl, batch: int, d: int) -> None:
    """Of 8192 rows a gradient summed in one chain had three times plain PyTorch's error, growing with √B."""
    z, z_pair = draw(batch, d, seed=1), draw(batch, d, seed=2)

    def gradient(name: Impl, dtype: torch.dtype) -> Tensor:
        leaf = z.to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(nt_xent(leaf, z_pair.to(dtype), temperature=0.2, impl=name), leaf)
        return slope.double()

    exact = gradient("reference", F64)
    kernel, plain = (float((gradient(name, F32) - exact).square().mean().sqrt()) for name in (impl, "reference"))
    assert kernel <= 1.5 * plain


@each(*KERNELS)
def test_zero_identical_and_nan_rows(impl: Impl) -> None:
    z, z_pair = views(2, 5, 16)
    z[0, 1] = 0
    z_pair[0] = z_pair[0, :1]
    z[1, 2, 3] = torch.nan
    check(impl, 0.2, [z, z_pair])


@cases("bad", {one: [(torch.inf,), (-torch.inf,)] for one in KERNELS})
def test_a_row_with_an_infinite_element(impl: Impl, bad: float) -> None:
    z, z_pair = views(1, 5, 16)
    z[0, 1, 3] = bad
    check(impl, 0.2, [z, z_pair])


@each(*KERNELS)
def test_a_row_whose_length_overflows(impl: Impl) -> None:
    z, z_pair = views(1, 5, 16)
    z[0, 1] = 1e30
    check(impl, 0.2, [z, z_pair])
    if impl == "native":  # which is right where plain float32 is not
        z, z_pair = z.double(), z_pair.double()
    actual, plain = (gradients(f, [z, z_pair]) for f in (rows_of(impl), plain_rows()))
    for mine, theirs in zip(actual, plain, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@each(*ALL)
def test_nan_reaches_its_group_only(impl: Impl) -> None:
    z, z_pair = views(2, 5, 4)
    z[0, 2, 1] = torch.nan
    rows = rows_of(impl)(z, z_pair)
    assert bool(rows[0].isnan().all())
    assert bool(rows[1].isfinite().all())


@each(*KERNELS)
def test_one_pair_costs_nothing(impl: Impl) -> None:
    for result in gradients(rows_of(impl), views(4, 1, 6)):
        assert not result.any()


@cases("shape", {one: [((0, 3, 4),), ((2, 0, 4),)] for one in ALL})
def test_a_group_of_nothing(impl: Impl, shape: tuple[int, int, int]) -> None:
    rows, *slopes = gradients(rows_of(impl), views(*shape))
    assert rows.numel() == 0
    assert all(x.shape == shape for x in slopes)


@each(*KERNELS)
def test_permuting_the_pairs_permutes_the_rows(impl: Impl) -> None:
    order = torch.randperm(35)

    def permuted(z: Tensor, z_pair: Tensor) -> Tensor:
        rows = rows_of(impl)(z[:, order], z_pair[:, order])
        return rows.unflatten(1, (2, 35))[:, :, order.argsort()].flatten(1)

    compare(permuted, plain_rows(), views(1, 35, 16))


@each(*KERNELS)
def test_permuting_the_columns_changes_nothing(impl: Impl) -> None:
    positive, order = torch.arange(7), torch.randperm(40)
    place = order.argsort()  # of each column among the permuted ones
    compare(
        lambda a, b: info_nce(a, b[:, order], place[positive], place[positive + 1], reduction="none", impl=impl),
        lambda a, b: R.info_nce_rows(a, b, positive, positive + 1, 0.07),
        [draw(1, 7, 16), draw(1, 40, 16, seed=1)],
    )


@each(*ALL)
def test_losses_may_be_changed_in_place(impl: Impl) -> None:
    z, z_pair = draw(2, 4, 16, seed=1).requires_grad_(), draw(2, 4, 16, seed=2)
    positive = torch.arange(4)
    for function in (
        lambda: nt_xent(z, z_pair, reduction="none", impl=impl),
        lambda: info_nce(z, z_pair, positive, reduction="none", impl=impl),
        lambda: info_nce(z[0], z_pair[0], positive, reduction="none", impl=impl),
    ):
        (expected,) = torch.autograd.grad(function().sum(), z)
        torch.testing.assert_close(torch.autograd.grad(function().mul_(2).sum(), z)[0], 2 * expected)


@each(*ALL)
def test_nt_xent_is_info_nce_row_by_row(impl: Impl) -> None:
    z, z_pair = views(2, 7, 16)
    both, index = torch.cat([z, z_pair], 1), torch.arange(14)
    rectangle = info_nce(both, both, index.roll(7), index, temperature=0.2, reduction="none", impl=impl)
    torch.testing.assert_close(rows_of(impl)(z, z_pair), rectangle)


# Below 0.0029 no fixed shift of the exponentials fits into float64: the other path of the native kernel.
@cases("tau, step", {one: [(0.002, 1e-7), (0.2, 1e-6)] for one in (REFERENCE, NATIVE)})
def test_derivatives_at_small_temperatures(impl: Impl, tau: float, step: float) -> None:
    temperature = torch.tensor(tau, dtype=F64, requires_grad=True)
    z, z_pair = (x.requires_grad_() for x in views(2, 3, 5, F64, seed=1))
    assert torch.autograd.gradcheck(
        lambda a, b, t: nt_xent(a, b, temperature=t, reduction="none", impl=impl),
        (z, z_pair, temperature),
        eps=step,
        rtol=1e-3,
    )
    rows, columns = (draw(2, n, 3, dtype=F64, seed=n).requires_grad_() for n in (4, 5))
    positive, exclude = torch.tensor([0, 1, 2, 4]), torch.tensor([1, 0, 4, 3])
    assert torch.autograd.gradcheck(
        lambda a, b, t: info_nce(a, b, positive, exclude, temperature=t, reduction="none", impl=impl),
        (rows, columns, temperature),
        eps=step,
        rtol=1e-3,
    )


@each(*ALL)
def test_vmap_maps_temperatures(impl: Impl) -> None:
    z, z_pair = views(3, 5, 16)
    taus = torch.tensor([0.1, 0.5])
    scan = torch.func.vmap(lambda t: nt_xent(z, z_pair, temperature=t, reduction="none", impl=impl))
    torch.testing.assert_close(scan(taus), torch.stack([R.nt_xent_rows(z, z_pair, t) for t in taus]))


def test_auto_takes_the_reference_in_forward_mode() -> None:
    x, y = draw(4, 6), draw(4, 6, seed=1)
    auto = torch.func.hessian(lambda x: nt_xent(x, y))(x)
    torch.testing.assert_close(auto, torch.func.hessian(lambda x: nt_xent(x, y, impl="reference"))(x))


@each(*KERNELS)
def test_a_differentiable_gradient_under_autocast_is_exact(impl: Impl) -> None:
    x, y = draw(64, 32, dtype=BF16), draw(64, 32, dtype=BF16, seed=1)
    temperature = torch.tensor(0.2, requires_grad=True)
    with torch.autocast("cpu", BF16):
        loss = nt_xent(x, y, temperature=temperature, impl=impl)
        (differentiable,) = torch.autograd.grad(loss, temperature, create_graph=True)
    exact = nt_xent(x.double(), y.double(), temperature=temperature.double(), impl="reference")
    (expected,) = torch.autograd.grad(exact, temperature)
    torch.testing.assert_close(differentiable.detach(), expected)


@each_dtype(*ALL)
def test_losses_are_float32(impl: Impl, dtype: torch.dtype) -> None:
    z, z_pair = views(1, 3, 4, dtype)
    assert rows_of(impl)(z, z_pair).dtype == F32
    assert info_nce(z, z_pair, torch.arange(3), impl=impl).dtype == F32


@each(*ALL)
def test_a_temperature_of_nothing_is_refused(impl: Impl) -> None:
    with pytest.raises(ArgumentError, match="temperature"):
        nt_xent(*views(1, 2, 16), temperature=0.0, impl=impl)


# Native: many groups of the smallest, since of few numbers plain PyTorch's error may be tiny by chance.
RECTANGLES = {
    NATIVE: [(16, 3, 2, 5), (2, 5, 70, 7), (1, 130, 33, 33), (2, 200, 300, 40)],
    TRITON: [(1, 33, 70, 40), (3, 7, 5, 16)],
}


@cases(
    "dtype, tau, excluding, shape",
    {
        NATIVE: product((F32, BF16), (0.005, 0.03, 0.2, 10.0), (False, True), RECTANGLES[NATIVE]),
        TRITON: product(TRITON.dtypes, (0.005, 0.022, 0.023, 10.0), (False, True), RECTANGLES[TRITON]),
    },
)
def test_info_nce_within_budget(
    impl: Impl, dtype: torch.dtype, tau: float, excluding: bool, shape: tuple[int, int, int, int]
) -> None:
    groups, rows, columns, features = shape
    positive = torch.arange(rows) % columns
    exclude = (positive + 1) % columns if excluding else None
    compare(
        lambda a, b: info_nce(a, b, positive, exclude, temperature=tau, reduction="none", impl=impl),
        lambda a, b: R.info_nce_rows(a, b, positive, exclude, tau),
        [draw(groups, rows, features, dtype=dtype, seed=1), draw(groups, columns, features, dtype=dtype, seed=2)],
    )


@each_dtype(*KERNELS)
def test_learned_temperature_of_info_nce_within_budget(impl: Impl, dtype: torch.dtype) -> None:
    """A temperature for each of four batches: over a single number plain PyTorch's error would be a matter of luck."""
    positive = torch.arange(33)

    def several(loss: Function) -> Function:
        return lambda a, b, t: torch.cat([loss(a[[k]], b[[k]], t[k]) for k in range(4)])

    compare(
        several(lambda a, b, t: info_nce(a, b, positive, temperature=t, reduction="none", impl=impl)),
        several(lambda a, b, t: R.info_nce_rows(a, b, positive, None, t)),
        [draw(4, 33, 40, dtype=dtype), draw(4, 33, 40, dtype=dtype, seed=1), torch.full((4,), 0.3)],
    )


@cases(
    "tau, seed, rows, columns, d",
    {
        one: [(tau, *sizes) for tau in (0.005, 0.022, 0.03, 0.07)]
        for one, sizes in ((NATIVE, (100, 200, 300, 40)), (TRITON, (0, 35, 70, 8)))
    },
)
def test_well_matched_rows_within_budget(impl: Impl, tau: float, seed: int, rows: int, columns: int, d: int) -> None:
    """Where the positive dominates its row, the loss is what is left of two large numbers."""
    keys, positive = draw(2, columns, d, seed=seed), torch.arange(rows).flip(0)
    compare(
        lambda a, b: info_nce(a, b, positive, temperature=tau, reduction="none", impl=impl),
        lambda a, b: R.info_nce_rows(a, b, positive, None, tau),
        [keys[:, positive] + 0.05 * draw(2, rows, d, seed=seed + 1), keys],
    )


@each(NATIVE)
def test_a_few_well_matched_rows_within_budget(impl: Impl) -> None:
    """Few columns: plain PyTorch's products are short sums, and a positive's rounding is the whole error of a loss."""
    positive, columns = torch.arange(8), draw(16, 8, 128)
    compare(
        lambda a, b: info_nce(a, b, positive, temperature=0.07, reduction="none", impl=impl),
        lambda a, b: R.info_nce_rows(a, b, positive, None, 0.07),
        [columns + draw(16, 8, 128, seed=1), columns],
    )
    view = draw(16, 2, 128, seed=2)
    check(impl, 0.07, [view, view + draw(16, 2, 128, seed=3)])


@each_dtype(NATIVE, among=(F32, BF16))
def test_products_of_the_library_within_budget(impl: Impl, dtype: torch.dtype) -> None:
    """Whole and partial tiles, an odd and a long row, a low temperature; bfloat16 with oneDNN off: the own products."""
    positive, exclude = torch.arange(150), torch.arange(150).roll(1)
    for on in (True, False):
        with torch.backends.mkldnn.flags(enabled=on):
            for batch, features, tau in ((64, 16, 0.2), (75, 33, 0.2), (100, 300, 0.02)):
                view = draw(2, batch, features, dtype=dtype)
                check(impl, tau, [view, (view + draw(2, batch, features, seed=1)).to(dtype)])
            compare(
                lambda a, b: info_nce(a, b, positive, exclude, temperature=0.2, reduction="none", impl=impl),
                lambda a, b: R.info_nce_rows(a, b, positive, exclude, 0.2),
                [draw(2, 150, 40, dtype=dtype), draw(2, 170, 40, dtype=dtype, seed=1)],
            )


@each(*KERNELS)
def test_clip_is_the_cross_entropy_of_similarities(impl: Impl) -> None:
    image, text, label = draw(6, 16), draw(6, 16, seed=1), torch.arange(6)

    def entropy(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(R.l2_normalize(a) @ R.l2_normalize(b).mT / 0.07, label)

    compare(lambda a, b: info_nce(a, b, label, impl=impl), entropy, [image, text])


@each(*ALL)
def test_an_index_out_of_range_is_refused(impl: Impl) -> None:
    rows = draw(3, 16)
    with pytest.raises(ArgumentError, match="positive"):
        info_nce(rows, rows, torch.tensor([0, 3, 1]), impl=impl)


def diagonal_left_in(impl: Impl, z: Tensor, z_pair: Tensor) -> Tensor:
    both, count = torch.cat([z, z_pair], 1), 2 * z.shape[1]
    positive = torch.arange(count).roll(count // 2)
    return info_nce(both, both, positive, temperature=0.2, reduction="none", impl=impl)


def tail_tile_dropped(impl: Impl, z: Tensor, z_pair: Tensor) -> Tensor:
    both, index = torch.cat([z, z_pair], 1), torch.arange(2 * z.shape[1])
    positive = index.roll(len(index) // 2)
    # The rows of the last tile keep their losses only where their columns are still there.
    kept = both[:, : len(index) // 32 * 32]
    inside = positive.clamp(max=kept.shape[1] - 1), index.clamp(max=kept.shape[1] - 1)
    return info_nce(both, kept, *inside, temperature=0.2, reduction="none", impl=impl)


def another_temperature(impl: Impl, z: Tensor, z_pair: Tensor) -> Tensor:
    return rows_of(impl, 0.21)(z, z_pair)


@cases("wrong", {one: [(f,) for f in (diagonal_left_in, tail_tile_dropped, another_temperature)] for one in ALL})
def test_a_wrong_loss_is_rejected(impl: Impl, wrong: Function) -> None:
    with pytest.raises(AssertionError, match=r"error .* of the largest magnitude"):
        compare(lambda a, b: wrong(impl, a, b), plain_rows(), views(1, 35, 16))


@each(*ALL)
def test_a_gradient_of_the_columns_from_half_of_the_rows_is_rejected(impl: Impl) -> None:
    def half(rows: Tensor, columns: Tensor) -> Tensor:
        first, second = rows.split([17, 16], dim=1)
        losses = (
            info_nce(first, columns, torch.arange(17), reduction="none", impl=impl),
            info_nce(second, columns.detach(), torch.arange(17, 33), reduction="none", impl=impl),
        )
        return torch.cat(losses, dim=1)

    inputs = [draw(1, 33, 16), draw(1, 40, 16, seed=1)]
    with pytest.raises(AssertionError, match="result 2: error"):
        compare(half, lambda a, b: R.info_nce_rows(a, b, torch.arange(33), None, 0.07), inputs)


@cases("dtype, tau", {one: product((F32, BF16), (0.03, 0.07, 0.5)) for one in KERNELS})
def test_a_converged_batch_within_budget(impl: Impl, dtype: torch.dtype, tau: float) -> None:
    """Losses of 1e-6 and less, and gradients of P − 1 for P close to 1.

    The rounding of a single logit decides a batch's error, so the errors of eight batches are added.
    """
    positive = torch.arange(9)
    pairs = [(rows_of(impl, tau), plain_rows(tau))]
    for exclude in (None, (positive + 1) % 9):
        pairs.append(
            (
                lambda a, b, e=exclude: info_nce(a, b, positive, e, temperature=tau, reduction="none", impl=impl),
                lambda a, b, e=exclude: R.info_nce_rows(a, b, positive, e, tau),
            )
        )
    batches = 8
    for kernel, reference in pairs:
        actual, plain, units = [0.0] * 3, [0.0] * 3, [0.0] * 3
        for seed in range(batches):
            z, noise = draw(1, 9, 40, seed=2 * seed), draw(1, 9, 40, seed=2 * seed + 1)
            inputs = [z.to(dtype), (z + 3e-3 * noise).to(dtype)]
            exact = gradients(reference, [x.double() for x in inputs])
            rounded = gradients(reference, inputs)
            for i, result in enumerate(gradients(kernel, inputs)):
                assert result.isfinite().all()
                actual[i] += error(result.double(), exact[i])
                plain[i] += error(rounded[i].to(result.dtype).double(), exact[i])
                units[i] = torch.finfo(result.dtype).eps
        for i in range(3):
            assert actual[i] <= 2 * plain[i] + 4 * batches * units[i], f"result {i}: {actual[i]}, plain {plain[i]}"


@cases("dtype, tau", {one: product((F32, BF16), (0.005, 0.03, 0.3)) for one in ALL})
def test_losses_are_never_negative(impl: Impl, dtype: torch.dtype, tau: float) -> None:
    unit = torch.linalg.qr(draw(32, 8))[0].mT
    for seed in range(5):
        z, z_pair = unit.to(dtype), (unit + 3e-3 * draw(8, 32, seed=seed)).to(dtype)
        assert bool((nt_xent(z, z_pair, temperature=tau, reduction="none", impl=impl) >= 0).all())
        assert bool((info_nce(z, z_pair, torch.arange(8), temperature=tau, reduction="none", impl=impl) >= 0).all())


@cases("tau", {one: [(0.005,), (0.07,), (0.5,)] for one in ALL})
def test_a_row_that_excludes_its_positive(impl: Impl, tau: float) -> None:
    """Decoupled contrastive learning: the logarithm of the negatives' sum, minus the positive."""
    positive = torch.tensor([0, 3, 2, 5])
    exclude = torch.tensor([0, 3, 4, 5])  # the third row excludes another column

    def decoupled(rows: Tensor, columns: Tensor) -> Tensor:
        logits = R.l2_normalize(rows) @ R.l2_normalize(columns).mT / tau  # [G, R, C]
        seen = torch.ones(4, 6, dtype=torch.bool).scatter(1, exclude[:, None], False)
        negatives = torch.where(seen, logits, -torch.inf).logsumexp(-1)
        return negatives - logits.gather(-1, positive.expand(2, 4)[..., None])[..., 0]

    compare(
        lambda a, b: info_nce(a, b, positive, exclude, temperature=tau, reduction="none", impl=impl),
        decoupled,
        [draw(2, 4, 16), draw(2, 6, 16, seed=1)],
    )


@cases("scale", {one: [(1e20,), (1e30,), (7e37,)] for one in ALL})
def test_rows_whose_squares_overflow(impl: Impl, scale: float) -> None:
    z, z_pair = views(1, 6, 16)
    for dtype in (F32, BF16):
        short, long = ([(x * factor).to(dtype) for x in (z, z_pair)] for factor in (1.0, scale))
        torch.testing.assert_close(rows_of(impl)(*long), rows_of(impl)(*short), rtol=0.05, atol=0)
    if impl != "reference":
        check(impl, 0.2, [z * scale, z_pair])


@each(*ALL)
def test_indices_may_be_slices(impl: Impl) -> None:
    rows, columns, index = draw(3, 8), draw(6, 8, seed=1), torch.arange(6)
    positive, exclude = index[::2], index[1::2]
    rows.requires_grad_()
    (got,) = torch.autograd.grad(info_nce(rows, columns, positive, exclude, impl=impl), rows)
    loss = info_nce(rows, columns, positive.contiguous(), exclude.contiguous(), impl=impl)
    (expected,) = torch.autograd.grad(loss, rows)
    assert torch.equal(got, expected)
