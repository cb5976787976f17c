"""Products of the native contrasts: kept for the backward pass, or made by the library of torch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from anomem import reference as R
from anomem.functional import info_nce
from anomem.ops import contrast as ops_contrast
from anomem.rules import Impl
from anomem.testing import compare, draw, gradients
from tests.operators.contract import BF16, F32, F64, NATIVE, cases, each, each_dtype
from tests.operators.contrast_calls import OPERATORS, check, plain_rows, rows_of, views

PASSES = ("fwd", "bwd")
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
    for most, kept in ((0, 0), (2 * tile, 0), (15 * tile + 1, 15), (2**30, 18)):  # two are hardly worth it
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


@cases("scale, tau", {NATIVE: product((1e-30, 1e-16, 1e16), (0.02, 0.2))})
def test_upstream_gradients_of_any_size_within_budget(impl: Impl, scale: float, tau: float) -> None:
    """On processors with tiles the weights of a row are taken apart into numbers of bfloat16, within a range."""
    loss, plain = rows_of(impl, tau), plain_rows(tau)
    compare(lambda *z: scale * loss(*z), lambda *z: scale * plain(*z), views(2, 80, 64))


@cases("scale", {NATIVE: [(1e-12,), (1e-25,)]})
def test_the_gradient_of_a_small_feature_keeps_its_digits(impl: Impl, scale: float) -> None:
    """Smaller by orders than the other features, whose rounding it must not get."""
    z, z_pair = (x * torch.where(torch.arange(64) == 9, scale, 1.0) for x in views(1, 150, 64))
    exact = gradients(plain_rows(), [z.double(), z_pair.double()])
    for actual, expected in zip(gradients(rows_of(impl), [z, z_pair])[1:], exact[1:], strict=True):
        error = (actual - expected)[..., 9].abs().max() / expected[..., 9].abs().max()
        assert error < 1e-5
