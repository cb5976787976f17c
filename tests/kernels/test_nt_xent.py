"""NT-Xent's Triton kernels in the interpreter, forward and backward, held to the float64 budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.testing import compare, draw

# Padding is computed and masked, so the interpreter's numpy may overflow where no result is.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel(tau: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, z_pair: AF.nt_xent(z, z_pair, temperature=tau, reduction="none", impl="triton")


def views(groups: int, batch: int, features: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(groups, batch, features, dtype=dtype), draw(groups, batch, features, dtype=dtype, seed=1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.005, 0.022, 0.023, 0.2, 10.0])
@pytest.mark.parametrize("shape", [(1, 33, 40), (3, 7, 16), (2, 1, 16)])
def test_rows_and_gradients(shape: tuple[int, int, int], tau: float, dtype: torch.dtype) -> None:
    compare(kernel(tau), lambda a, b: R.nt_xent_rows(a, b, tau), views(*shape, dtype))


@pytest.mark.parametrize("shape", [(1, 35, 128), (1, 6, 300), (1, 70, 16)])
def test_many_tiles_and_slices_of_features(shape: tuple[int, int, int]) -> None:
    compare(kernel(0.2), lambda a, b: R.nt_xent_rows(a, b, 0.2), views(*shape))


@pytest.mark.parametrize("tau", [0.01, 0.3])
def test_learned_temperature(tau: float) -> None:
    compare(
        lambda a, b, t: AF.nt_xent(a, b, temperature=t, reduction="none", impl="triton"),
        R.nt_xent_rows,
        [*views(2, 33, 40), torch.tensor(tau)],
    )


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


def test_equals_info_nce_row_by_row_and_is_deterministic() -> None:
    z, z_pair = views(1, 7, 16)
    both, index = torch.cat([z, z_pair], 1), torch.arange(14)
    rows = kernel(0.2)(z, z_pair)
    assert torch.equal(rows, kernel(0.2)(z, z_pair))
    rectangle = AF.info_nce(both, both, index.roll(7), index, temperature=0.2, reduction="none", impl="triton")
    torch.testing.assert_close(rows, rectangle)


def test_bad_temperature() -> None:
    with pytest.raises(ArgumentError, match="temperature"):
        AF.nt_xent(*views(1, 2, 16), temperature=0.0, impl="triton")
