"""InfoNCE's Triton kernels in the interpreter, forward and backward, held to the float64 budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import anomem.ops.contrast  # noqa: F401  registers the operators that opcheck is given
from anomem import functional as AF
from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.testing import compare, draw, gradients

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_learned_temperature(dtype: torch.dtype) -> None:
    """A temperature for each of four batches: over a single number plain PyTorch's error would be a matter of luck."""
    positive = torch.arange(33)

    def each(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, b, t: torch.cat([loss(a[[k]], b[[k]], t[k]) for k in range(4)])

    compare(
        each(lambda a, b, t: AF.info_nce(a, b, positive, temperature=t, reduction="none", impl="triton")),
        each(lambda a, b, t: R.info_nce_rows(a, b, positive, None, t)),
        [draw(4, 33, 40, dtype=dtype), draw(4, 33, 40, dtype=dtype, seed=1), torch.full((4,), 0.3)],
    )


def test_two_runs_give_the_same_bits() -> None:
    positive = torch.arange(33) + 20
    inputs = [draw(1, 33, 40), draw(1, 70, 40, seed=1), torch.tensor(0.2)]
    first, second = (
        gradients(lambda a, b, t: AF.info_nce(a, b, positive, temperature=t, reduction="none", impl="triton"), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_permuting_the_columns_changes_nothing() -> None:
    positive, order = torch.arange(7), torch.randperm(40)
    place = order.argsort()  # of each column among the permuted ones
    compare(
        lambda a, b: AF.info_nce(a, b[:, order], place[positive], place[positive + 1], reduction="none", impl="triton"),
        lambda a, b: R.info_nce_rows(a, b, positive, positive + 1, 0.07),
        [draw(1, 7, 16), draw(1, 40, 16, seed=1)],
    )


def test_the_operators_keep_their_promises() -> None:
    rows, columns, positive = draw(2, 3, 16), draw(2, 5, 16, seed=1), torch.tensor([4, 0, 2])
    for exclude, temperature in ((None, None), (torch.tensor([0, 1, 3]), torch.tensor(0.2))):
        given = (positive, exclude, temperature, 0.2)
        torch.library.opcheck(torch.ops.anomem.triton_info_nce_fwd.default, (rows, columns, *given))
        loss, lse, *unit = torch.ops.anomem.triton_info_nce_fwd(rows, columns, *given)
        torch.library.opcheck(torch.ops.anomem.triton_info_nce_bwd.default, (torch.ones_like(loss), *unit, lse, *given))


def test_compiled_without_graph_breaks_at_any_size() -> None:
    def loss(a: Tensor, b: Tensor, positive: Tensor) -> Tensor:
        return AF.info_nce(a, b, positive, reduction="none", impl="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 4):
        inputs = [draw(2, count, 16), draw(2, 7, 16, seed=1), torch.arange(count)]
        for mine, eager in zip(gradients(compiled, inputs), gradients(loss, inputs), strict=True):
            assert torch.equal(mine, eager)


def test_double_backward() -> None:
    positive, exclude = torch.arange(5), torch.arange(5) + 1

    def gradient_of(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *x: torch.autograd.grad(loss(*x).square().sum(), x, create_graph=True)

    compare(
        gradient_of(lambda a, b: AF.info_nce(a, b, positive, exclude, reduction="none", impl="triton")),
        gradient_of(lambda a, b: R.info_nce_rows(a, b, positive, exclude, 0.07)),
        [draw(1, 5, 16), draw(1, 9, 16, seed=1)],
    )


def test_vmap_folds_into_groups() -> None:
    rows, columns, positive = draw(3, 5, 16), draw(3, 9, 16, seed=1), torch.arange(5)
    mapped = torch.func.vmap(lambda a, b: AF.info_nce(a, b, positive, reduction="none", impl="triton"))
    assert torch.equal(mapped(rows, columns), AF.info_nce(rows, columns, positive, reduction="none", impl="triton"))


def test_a_gradient_of_the_columns_from_half_of_the_rows_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.kernels import contrast

    positive, complete = torch.arange(33), contrast.gradient

    def half(role: object, owned: Tensor, streamed: Tensor, *rest: object) -> Tensor | None:
        inverse_owned, inverse_streamed, lse, upstream, *others = rest
        if role == contrast.COLUMNS:
            upstream = upstream.clone()
            upstream[:, upstream.shape[1] // 2 :] = 0
        return complete(role, owned, streamed, inverse_owned, inverse_streamed, lse, upstream, *others)

    inputs = [draw(1, 33, 16), draw(1, 40, 16, seed=1)]
    functions = (
        lambda a, b: AF.info_nce(a, b, positive, reduction="none", impl="triton"),
        lambda a, b: R.info_nce_rows(a, b, positive, None, 0.07),
    )
    compare(*functions, inputs)
    monkeypatch.setattr(contrast, "gradient", half)
    with pytest.raises(AssertionError, match="result 2: error"):
        compare(*functions, inputs)


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
