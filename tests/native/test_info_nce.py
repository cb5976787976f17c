"""Native rectangular InfoNCE on the CPU against the reference."""

from __future__ import annotations

import pytest
import torch

import anomem.ops.contrast  # noqa: F401  registers the operators that opcheck is given
from anomem.functional import info_nce
from anomem.reference import info_nce_rows
from anomem.testing import compare, draw, gradients
from tests.native.invariances import assert_same_bits_with_any_number_of_threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.005, 0.03, 0.2, 10.0])
@pytest.mark.parametrize("excluding", [False, True])
# Many groups of the smallest: of few numbers plain PyTorch's error may be tiny by chance.
@pytest.mark.parametrize("shape", [(16, 3, 2, 5), (2, 5, 70, 7), (1, 130, 33, 33), (2, 200, 300, 40)])
def test_within_budget(shape: tuple[int, int, int, int], excluding: bool, tau: float, dtype: torch.dtype) -> None:
    groups, rows, columns, features = shape
    positive = torch.arange(rows) % columns
    exclude = (positive + 1) % columns if excluding else None
    compare(
        lambda a, b: info_nce(a, b, positive, exclude, temperature=tau, reduction="none", impl="native"),
        lambda a, b: info_nce_rows(a, b, positive, exclude, tau),
        (draw(groups, rows, features, dtype=dtype, seed=1), draw(groups, columns, features, dtype=dtype, seed=2)),
    )


@pytest.mark.parametrize(("tau", "step"), [(0.002, 1e-7), (0.3, 1e-6)])
def test_gradcheck(tau: float, step: float) -> None:
    leaves = (
        draw(2, 4, 3, dtype=torch.float64, seed=1).requires_grad_(),
        draw(2, 5, 3, dtype=torch.float64, seed=2).requires_grad_(),
        torch.tensor(tau, dtype=torch.float64, requires_grad=True),
    )
    positive, exclude = torch.tensor([0, 1, 2, 4]), torch.tensor([1, 0, 4, 3])
    assert torch.autograd.gradcheck(
        lambda a, b, t: info_nce(a, b, positive, exclude, temperature=t, reduction="none", impl="native"),
        leaves,
        eps=step,
        rtol=1e-3,
    )


def test_opcheck_and_compile() -> None:
    rows, columns, positive = draw(2, 4, 3), draw(2, 5, 3, seed=1), torch.tensor([0, 1, 2, 4])
    operators = torch.ops.anomem
    for exclude, temperature in ((None, None), ((positive + 1) % 5, torch.tensor(0.3))):
        forward = (rows, columns, positive, exclude, temperature, 0.2)
        torch.library.opcheck(operators.native_info_nce_fwd.default, forward)
        loss, total, *inv_norms = operators.native_info_nce_fwd(*forward)
        backward = (torch.ones_like(loss), rows, columns, *inv_norms, total, positive, exclude, temperature, 0.2)
        torch.library.opcheck(operators.native_info_nce_bwd.default, backward)
    compiled = torch.compile(lambda a, b: info_nce(a, b, positive, impl="native"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows, columns), info_nce(rows, columns, positive, impl="native"))


def test_autocast() -> None:
    rows, columns, positive = draw(2, 4, 3), draw(2, 5, 3, seed=1), torch.tensor([0, 1, 2, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = info_nce(rows, columns, positive, impl="native")
    assert torch.equal(cast, info_nce(rows.bfloat16(), columns.bfloat16(), positive, impl="native"))


def test_same_bits_with_any_number_of_threads() -> None:
    sides = [draw(1, n, 20, seed=n) for n in (300, 500)]
    assert_same_bits_with_any_number_of_threads(
        lambda: gradients(lambda a, b: info_nce(a, b, torch.arange(300), impl="native"), sides)
    )


def test_an_index_out_of_range_is_refused_by_the_operator() -> None:
    rows, columns = draw(1, 2, 3), draw(1, 4, 3)
    with pytest.raises(RuntimeError, match="`positive`: expected indices from 0 to 3, received 4"):
        torch.ops.anomem.native_info_nce_fwd(rows, columns, torch.tensor([0, 4]), None, None, 0.2)


@pytest.mark.parametrize("tau", [0.005, 0.022, 0.03, 0.07])
def test_well_matched_rows_within_budget(tau: float) -> None:
    """Where the positive dominates its row, the loss is what is left of two large numbers."""
    columns, positive = draw(2, 300, 40), torch.arange(200).flip(0)
    compare(
        lambda a, b: info_nce(a, b, positive, temperature=tau, reduction="none", impl="native"),
        lambda a, b: info_nce_rows(a, b, positive, None, tau),
        (columns[:, positive] + 0.05 * draw(2, 200, 40, seed=1), columns),
    )
