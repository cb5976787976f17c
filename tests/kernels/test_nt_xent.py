"""NT-Xent's Triton kernels in the interpreter, forward and backward, held to the float64 budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import anomem.ops.contrast  # noqa: F401  registers the operators that opcheck is given
from anomem import functional as AF
from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.testing import assert_within_budget, compare, draw, gradients

# Padding is computed and masked, so the interpreter's numpy may overflow where no result is.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel(tau: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, z_pair: AF.nt_xent(z, z_pair, temperature=tau, reduction="none", impl="triton")


def views(groups: int, batch: int, features: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(groups, batch, features, dtype=dtype), draw(groups, batch, features, dtype=dtype, seed=1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.005, 0.022, 0.023, 0.2, 10.0])
@pytest.mark.parametrize("shape", [(1, 33, 40), (3, 7, 16), (1, 2, 16), (2, 1, 16)])
def test_rows_and_gradients(shape: tuple[int, int, int], tau: float, dtype: torch.dtype) -> None:
    compare(kernel(tau), lambda a, b: R.nt_xent_rows(a, b, tau), views(*shape, dtype))


@pytest.mark.parametrize("shape", [(1, 35, 128), (1, 6, 300), (1, 70, 16)])
def test_many_tiles_and_slices_of_features(shape: tuple[int, int, int]) -> None:
    compare(kernel(0.2), lambda a, b: R.nt_xent_rows(a, b, 0.2), views(*shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.01, 0.3])
def test_learned_temperature(tau: float, dtype: torch.dtype) -> None:
    """A temperature for each of four batches: over a single number plain PyTorch's error would be a matter of luck."""

    def each(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, b, t: torch.cat([loss(a[[k]], b[[k]], t[k]) for k in range(4)])

    compare(
        each(lambda a, b, t: AF.nt_xent(a, b, temperature=t, reduction="none", impl="triton")),
        each(R.nt_xent_rows),
        [*views(4, 17, 40, dtype), torch.full((4,), tau)],
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("tau", [0.005, 0.2])
@pytest.mark.parametrize("shape", [(1, 33, 40), (1, 2, 16), (1, 2, 128)])
def test_losses_of_short_floats_are_as_exact_as_in_float32(
    shape: tuple[int, int, int], tau: float, dtype: torch.dtype
) -> None:
    z, z_pair = views(*shape, dtype)
    plain, exact = (R.nt_xent_rows(z.to(wide), z_pair.to(wide), tau) for wide in (torch.float32, torch.float64))
    assert_within_budget(kernel(tau)(z, z_pair), plain, exact)
    rounded = [R.l2_normalize(x.float()).to(dtype).float() for x in (z, z_pair)]
    with pytest.raises(AssertionError, match=r"error .* of the largest magnitude"):
        assert_within_budget(R.nt_xent_rows(*rounded, tau), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1e-3, 1e4])
def test_the_lengths_of_the_rows_do_not_matter(length: float, dtype: torch.dtype) -> None:
    z, z_pair = views(1, 9, 16, dtype)
    z[:, ::2] *= length
    compare(kernel(0.2), lambda a, b: R.nt_xent_rows(a, b, 0.2), [z, z_pair])


def test_strided_views_are_read_in_place() -> None:
    z = draw(7, 2, 40).transpose(0, 1)[:, :, 8:]
    z_pair = draw(2, 14, 32, seed=1)[:, ::2]
    torch.testing.assert_close(kernel(0.2)(z, z_pair), kernel(0.2)(z.contiguous(), z_pair.contiguous()), rtol=0, atol=0)


def test_zero_identical_and_nan_rows() -> None:
    z, z_pair = views(2, 5, 16)
    z[0, 1] = 0
    z_pair[0] = z_pair[0, :1]
    z[1, 2, 3] = torch.nan
    compare(kernel(0.2), lambda a, b: R.nt_xent_rows(a, b, 0.2), [z, z_pair])


def test_a_row_with_an_infinite_element() -> None:
    z, z_pair = views(1, 5, 16)
    z[0, 1, 3] = torch.inf
    compare(kernel(0.2), lambda a, b: R.nt_xent_rows(a, b, 0.2), [z, z_pair])


def test_a_row_whose_length_overflows() -> None:
    z, z_pair = views(1, 5, 16)
    z[0, 1] = 1e30
    actual, plain = (gradients(f, [z, z_pair]) for f in (kernel(0.2), lambda a, b: R.nt_xent_rows(a, b, 0.2)))
    for mine, theirs in zip(actual, plain, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    inputs = [*views(1, 33, 16, dtype), torch.tensor(0.2)]
    first, second = (
        gradients(lambda a, b, t: AF.nt_xent(a, b, temperature=t, reduction="none", impl="triton"), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_permuting_the_pairs_permutes_the_rows() -> None:
    order = torch.randperm(35)

    def permuted(z: Tensor, z_pair: Tensor) -> Tensor:
        rows = kernel(0.2)(z[:, order], z_pair[:, order])
        return rows.unflatten(1, (2, 35))[:, :, order.argsort()].flatten(1)

    compare(permuted, lambda a, b: R.nt_xent_rows(a, b, 0.2), views(1, 35, 16))


def test_equals_info_nce_row_by_row() -> None:
    z, z_pair = views(1, 7, 16)
    both, index = torch.cat([z, z_pair], 1), torch.arange(14)
    rows = kernel(0.2)(z, z_pair)
    rectangle = AF.info_nce(both, both, index.roll(7), index, temperature=0.2, reduction="none", impl="triton")
    torch.testing.assert_close(rows, rectangle)


def test_bad_temperature() -> None:
    with pytest.raises(ArgumentError, match="temperature"):
        AF.nt_xent(*views(1, 2, 16), temperature=0.0, impl="triton")


def test_the_operators_keep_their_promises() -> None:
    z, z_pair = views(2, 3, 16)
    for temperature in (None, torch.tensor(0.2)):
        given = (temperature, 0.2)
        torch.library.opcheck(torch.ops.anomem.triton_nt_xent_fwd.default, (z, z_pair, *given))
        rows, lse, unit, inv_norm = torch.ops.anomem.triton_nt_xent_fwd(z, z_pair, *given)
        torch.library.opcheck(
            torch.ops.anomem.triton_nt_xent_bwd.default, (torch.ones_like(rows), unit, inv_norm, lse, *given)
        )


def test_compiled_without_graph_breaks_at_any_batch() -> None:
    compiled = torch.compile(kernel(0.2), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        inputs = views(2, batch, 16)
        for mine, eager in zip(gradients(compiled, inputs), gradients(kernel(0.2), inputs), strict=True):
            assert torch.equal(mine, eager)


def test_double_backward() -> None:
    def gradient_of(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *x: torch.autograd.grad(loss(*x).square().sum(), x, create_graph=True)

    compare(
        gradient_of(lambda a, b, t: AF.nt_xent(a, b, temperature=t, reduction="none", impl="triton")),
        gradient_of(R.nt_xent_rows),
        [*views(1, 5, 16), torch.tensor(0.2)],
    )


def test_vmap_folds_into_groups_and_maps_temperatures() -> None:
    z, z_pair = views(3, 5, 16)
    mapped = torch.func.vmap(lambda a, b: AF.nt_xent(a, b, temperature=0.2, reduction="none", impl="triton"))
    assert torch.equal(mapped(z, z_pair), kernel(0.2)(z, z_pair))
    scan = torch.func.vmap(lambda t: AF.nt_xent(z, z_pair, temperature=t, reduction="none", impl="triton"))
    taus = torch.tensor([0.1, 0.5])
    torch.testing.assert_close(scan(taus), torch.stack([R.nt_xent_rows(z, z_pair, t) for t in taus]))


def diagonal_left_in(z: Tensor, z_pair: Tensor) -> Tensor:
    both, count = torch.cat([z, z_pair], 1), 2 * z.shape[1]
    positive = torch.arange(count).roll(count // 2)
    return AF.info_nce(both, both, positive, temperature=0.2, reduction="none", impl="triton")


def tail_tile_dropped(z: Tensor, z_pair: Tensor) -> Tensor:
    both, index = torch.cat([z, z_pair], 1), torch.arange(2 * z.shape[1])
    positive = index.roll(len(index) // 2)
    # The rows of the last tile keep their losses only where their columns are still there.
    kept = both[:, : len(index) // 32 * 32]
    inside = positive.clamp(max=kept.shape[1] - 1), index.clamp(max=kept.shape[1] - 1)
    return AF.info_nce(both, kept, *inside, temperature=0.2, reduction="none", impl="triton")


def another_temperature(z: Tensor, z_pair: Tensor) -> Tensor:
    return kernel(0.21)(z, z_pair)


@pytest.mark.parametrize("wrong", [diagonal_left_in, tail_tile_dropped, another_temperature])
def test_a_wrong_kernel_is_rejected(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match=r"error .* of the largest magnitude"):
        compare(wrong, lambda a, b: R.nt_xent_rows(a, b, 0.2), views(1, 35, 16))
