"""InfoNCE's Triton kernels in the interpreter, forward and backward, held to the float64 budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.testing import compare, draw

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.005, 0.022, 0.023, 10.0])
@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("shape", [(1, 33, 70, 40), (3, 7, 5, 16)])
def test_losses_and_gradients(shape: tuple[int, ...], excluding: bool, tau: float, dtype: torch.dtype) -> None:
    groups, rows, columns, features = shape
    positive = torch.arange(rows) % columns
    exclude = (positive + 1) % columns if excluding else None
    compare(
        lambda a, b: AF.info_nce(a, b, positive, exclude, temperature=tau, reduction="none", impl="triton"),
        lambda a, b: R.info_nce_rows(a, b, positive, exclude, tau),
        [draw(groups, rows, features, dtype=dtype), draw(groups, columns, features, dtype=dtype, seed=1)],
    )


def test_learned_temperature() -> None:
    positive = torch.arange(33)
    compare(
        lambda a, b, t: AF.info_nce(a, b, positive, temperature=t, reduction="none", impl="triton"),
        lambda a, b, t: R.info_nce_rows(a, b, positive, None, t),
        [draw(2, 33, 40), draw(2, 33, 40, seed=1), torch.tensor(0.3)],
    )


def test_clip_is_the_cross_entropy_of_similarities() -> None:
    image, text, label = draw(6, 16), draw(6, 16, seed=1), torch.arange(6)

    def entropy(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(R.l2_normalize(a) @ R.l2_normalize(b).mT / 0.07, label)

    compare(lambda a, b: AF.info_nce(a, b, label, impl="triton"), entropy, [image, text])


def test_an_index_out_of_range_is_an_error_here_and_nan_on_a_device() -> None:
    rows, bad = draw(1, 3, 16), torch.tensor([0, 3, 1])
    with pytest.raises(ArgumentError, match="positive"):
        AF.info_nce(rows[0], rows[0], bad, impl="triton")
    loss = torch.ops.anomem.triton_info_nce_fwd(rows, rows, bad, None, None, 0.2)[0]
    assert loss.isnan().tolist() == [[False, True, False]]
