"""NT-Xent and its rectangular form, InfoNCE, by every implementation: the contract, invariances, errors."""

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
from anomem.rules import Impl
from anomem.testing import compare, draw, gradients
from tests.operators.contract import BF16, F32, F64, NATIVE, REFERENCE, Contract, cases, each, each_dtype
from tests.operators.contrast_calls import ALL, KERNELS, OPERATORS, plain_rows, rows_of, views


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


@each(*ALL)
def test_indices_may_be_slices(impl: Impl) -> None:
    rows, columns, index = draw(3, 8), draw(6, 8, seed=1), torch.arange(6)
    positive, exclude = index[::2], index[1::2]
    rows.requires_grad_()
    (got,) = torch.autograd.grad(info_nce(rows, columns, positive, exclude, impl=impl), rows)
    loss = info_nce(rows, columns, positive.contiguous(), exclude.contiguous(), impl=impl)
    (expected,) = torch.autograd.grad(loss, rows)
    assert torch.equal(got, expected)
