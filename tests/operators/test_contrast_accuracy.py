"""Losses and gradients of NT-Xent and InfoNCE within the error budget, and wrong ones outside it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from anomem import reference as R
from anomem.functional import info_nce, nt_xent
from anomem.rules import Impl
from anomem.testing import assert_within_budget, compare, draw, error, gradients
from tests.operators.contract import BF16, F16, F32, F64, NATIVE, TRITON, Function, cases, each, each_dtype
from tests.operators.contrast_calls import ALL, KERNELS, check, plain_rows, rows_of, views

TAUS = [0.005, 0.022, 0.023, 0.2, 10.0]
NATIVE_SHAPES = [(1, 1, 3), (4, 2, 5), (2, 3, 7), (1, 16, 33), (3, 65, 17), (2, 200, 40), (1, 300, 130), (16, 9, 64)]
TRITON_SHAPES = [(1, 33, 40), (3, 7, 16), (1, 2, 16), (2, 1, 16)]
MANY_TILES = [(1, 35, 128), (1, 6, 300), (1, 70, 16), (1, 70, 130)]  # and slices of features, and chunks of rows


@cases(
    "dtype, tau, shape",
    {
        NATIVE: product((F32, BF16), TAUS, NATIVE_SHAPES),
        TRITON: [
            *product((F32,), TAUS, TRITON_SHAPES),
            *product((BF16, F16), (0.022, 0.2), TRITON_SHAPES),  # with peaks, and with a fixed shift
            *product((F32, BF16), (0.2,), MANY_TILES),
        ],
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


@cases("batch, d", {NATIVE: [(2048, 8)], TRITON: [(128, 8)]})
def test_rounding_does_not_grow_with_the_batch(impl: Impl, batch: int, d: int) -> None:
    """Of 8192 rows a gradient summed in one chain had three times plain PyTorch's error, growing with √B: of these
    4096 twice.
    """
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


# Native: many groups of the smallest, since of few numbers plain PyTorch's error may be tiny by chance.
RECTANGLES = {
    NATIVE: [(16, 3, 2, 5), (2, 5, 70, 7), (1, 130, 33, 33), (2, 200, 300, 40)],
    TRITON: [(1, 33, 70, 40), (3, 7, 5, 16)],
}


@cases(
    "dtype, tau, excluding, shape",
    {
        NATIVE: product((F32, BF16), (0.005, 0.03, 0.2, 10.0), (False, True), RECTANGLES[NATIVE]),
        TRITON: [
            *product((F32,), (0.005, 0.022, 0.023, 10.0), (False, True), RECTANGLES[TRITON]),
            *product((BF16, F16), (0.022, 10.0), (False, True), RECTANGLES[TRITON]),
        ],
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


@cases("scale", {one: [(1e20,), (1e30,), (7e37,)] for one in ALL})
def test_rows_whose_squares_overflow(impl: Impl, scale: float) -> None:
    z, z_pair = views(1, 6, 16)
    for dtype in (F32, BF16):
        short, long = ([(x * factor).to(dtype) for x in (z, z_pair)] for factor in (1.0, scale))
        torch.testing.assert_close(rows_of(impl)(*long), rows_of(impl)(*short), rtol=0.05, atol=0)
    if impl != "reference":
        check(impl, 0.2, [z * scale, z_pair])
