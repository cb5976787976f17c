"""Native gather of sampled positions and variance hinge on the CPU against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomem import reference
from anomem.functional import gather_positions, variance_hinge
from anomem.testing import compare, draw, gradients
from tests.native.invariances import assert_same_bits_with_any_number_of_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# B, C, H, W, n: every size meets a tail of some block, and few images as well as many.
SHAPES = [(1, 1, 1, 1, 1), (3, 5, 4, 7, 9), (20, 33, 5, 5, 70), (2, 130, 16, 16, 64)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2],
}


def positions_in(area: int, *shape: int) -> Tensor:
    return torch.randint(area, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_within_budget(
    shape: tuple[int, int, int, int, int], per_image: bool, normalize: bool, dtype: torch.dtype
) -> None:
    """Positions repeat in most shapes: there the gradients add up."""
    batch, channels, height, width, count = shape
    leading = (batch,) if per_image else ()
    positions = positions_in(height * width, *leading, count)
    compare(
        lambda x: gather_positions(x, positions, normalize=normalize, impl="native"),
        lambda x: reference.gather_positions(x, positions, normalize=normalize),
        [draw(batch, channels, height, width, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_from_any_layout(layout: str, dtype: torch.dtype) -> None:
    """The same bits as from a contiguous map, and a gradient in the layout of the map."""
    feature_map = LAYOUTS[layout](draw(3, 37, 4, 5, dtype=dtype))
    positions = positions_in(20, 3, 11)
    results = []
    for x in (feature_map.detach(), feature_map.contiguous()):
        leaf = x.requires_grad_()
        vectors = gather_positions(leaf, positions, normalize=True, impl="native")
        (gradient,) = torch.autograd.grad(vectors, leaf, draw(*vectors.shape, dtype=dtype, seed=2))
        results.append((vectors, gradient))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    if layout == "channels_last":
        assert results[0][1].is_contiguous(memory_format=torch.channels_last)


def test_gather_without_normalisation_copies() -> None:
    feature_map, positions = draw(3, 5, 4, 7), positions_in(28, 3, 9)
    expected = reference.gather_positions(feature_map, positions)
    assert torch.equal(gather_positions(feature_map, positions, impl="native"), expected)


def test_a_zero_vector_stays_zero_and_passes_no_gradient() -> None:
    feature_map = draw(2, 6, 2, 2)
    feature_map[1, :, 0, 1] = 0
    leaf = feature_map.requires_grad_()
    vectors = gather_positions(leaf, torch.arange(4), normalize=True, impl="native")
    (gradient,) = torch.autograd.grad(vectors.sum(), leaf)
    assert bool((vectors[1, 1] == 0).all() and (gradient[1, :, 0, 1] == 0).all())
    assert bool((gradient[0] != 0).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_vector_spoils_itself_only(bad: float) -> None:
    feature_map = draw(2, 6, 2, 2)
    feature_map[1, 3, 0, 1] = bad
    got = gather_positions(feature_map, torch.arange(4), normalize=True, impl="native")
    expected = reference.gather_positions(feature_map, torch.arange(4), normalize=True)
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize("shape", [(0, 4, 2, 2, 3), (2, 4, 2, 2, 0), (2, 0, 2, 2, 3)])
@pytest.mark.parametrize("per_image", [False, True])
def test_nothing_to_gather(shape: tuple[int, int, int, int, int], per_image: bool) -> None:
    *sizes, count = shape
    leaf = torch.randn(sizes).requires_grad_()
    positions = torch.zeros((sizes[0], count) if per_image else (count,), dtype=torch.int64)
    vectors = gather_positions(leaf, positions, normalize=True, impl="native")
    assert vectors.shape == (count, sizes[0], sizes[1])
    (gradient,) = torch.autograd.grad(vectors.sum(), leaf)
    assert torch.equal(gradient, torch.zeros(sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 17, 33), (9, 40, 300), (1, 130, 70)])
def test_variance_within_budget(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    def compute(x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return reference.variance_hinge(wide, 1.1, 1e-4)

    compare(
        lambda x: variance_hinge(x, gamma=1.1, reduction="none", impl="native"), compute, [draw(*shape, dtype=dtype)]
    )


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_variance_far_from_zero(offset: float) -> None:
    """A mean that is much larger than the deviation costs nothing: the squares are of centred numbers."""
    compare(
        lambda x: variance_hinge(x, gamma=3.0, reduction="none", impl="native"),
        lambda x: reference.variance_hinge(x, 3.0),
        [draw(2, 200, 20) + offset],
    )


def test_variance_of_equal_rows_and_of_wide_ones() -> None:
    """Zero variance: the hinge is gamma − sqrt(eps), without a gradient. Beyond gamma: no loss and no gradient."""
    for scale, expected in ((0.0, 1 - 1e-2), (50.0, 0.0)):
        leaf = (draw(1, 30, 4) * scale).requires_grad_()
        loss = variance_hinge(leaf, impl="native")
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        assert bool((gradient == 0).all())


def test_nan_reaches_its_group_only() -> None:
    x = draw(2, 5, 4)
    x[0, 2, 1] = torch.nan
    loss = variance_hinge(x, reduction="none", impl="native")
    assert loss.isnan().tolist() == [True, False]


def chain(feature_map: Tensor, positions: Tensor) -> Tensor:
    vectors = gather_positions(feature_map, positions, normalize=True, impl="native")
    return variance_hinge(vectors, gamma=0.5, impl="native")


@pytest.mark.parametrize("per_image", [False, True])
def test_same_bits_with_any_number_of_threads(per_image: bool) -> None:
    positions = positions_in(36, *((5,) if per_image else ()), 70)
    assert_same_bits_with_any_number_of_threads(lambda: gradients(chain, [draw(5, 100, 6, 6), positions]))


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool) -> None:
    feature_map = draw(2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    for positions in (torch.tensor([5, 0, 5]), torch.tensor([[1, 1], [4, 0]])):
        assert torch.autograd.gradcheck(
            lambda x, p=positions: gather_positions(x, p, normalize=normalize, impl="native"), feature_map
        )
    rows = draw(2, 4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: variance_hinge(x, gamma=2.0, reduction="none", impl="native"), rows)


@pytest.mark.parametrize("normalize", [False, True])
def test_double_backward(normalize: bool) -> None:
    feature_map = draw(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    positions = torch.tensor([3, 0, 3])
    assert torch.autograd.gradgradcheck(
        lambda x: gather_positions(x, positions, normalize=normalize, impl="native"), feature_map
    )
    rows = draw(1, 4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: variance_hinge(x, gamma=2.0, impl="native"), rows)


def test_opcheck() -> None:
    operators = torch.ops.anomem
    feature_map, positions = draw(2, 5, 3, 4), torch.tensor([7, 0, 7])
    gather_positions(feature_map, positions, impl="native")
    for channels_last in (False, True):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        arguments = (feature_map.contiguous(memory_format=layout), positions, True)
        torch.library.opcheck(operators.native_gather_fwd.default, arguments)
        out, inv_norm = operators.native_gather_fwd(*arguments)
        backward = (out, out, inv_norm, positions, [2, 5, 3, 4], channels_last, True)
        torch.library.opcheck(operators.native_gather_bwd.default, backward)
    rows = draw(2, 6, 5)
    torch.library.opcheck(operators.native_variance_fwd.default, (rows, 2.0, 1e-4))
    loss, mean, std = operators.native_variance_fwd(rows, 2.0, 1e-4)
    torch.library.opcheck(operators.native_variance_bwd.default, (loss, rows, mean, std, 2.0))


def test_compiles_in_one_graph() -> None:
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    leaf, positions = draw(3, 7, 4, 4).requires_grad_(), positions_in(16, 5)
    expected, got = (torch.autograd.grad(f(leaf, positions), leaf) for f in (chain, compiled))
    assert torch.equal(*expected, *got)


def test_the_operators_refuse_what_would_read_outside() -> None:
    operators = torch.ops.anomem
    feature_map, rows = draw(2, 5, 3, 4), draw(2, 6, 5)
    gather_positions(feature_map, torch.tensor([0]), impl="native")
    vectors, inv_norm = operators.native_gather_fwd(feature_map, torch.tensor([1, 2]), True)
    for operator, arguments, message in (
        (
            operators.native_gather_fwd,
            (feature_map, torch.tensor([12]), False),
            "`positions`: expected indices from 0 to 11, received 12",
        ),
        (
            operators.native_gather_fwd,
            (feature_map, torch.tensor([-1]), False),
            "`positions`: expected indices from 0 to 11, received -1",
        ),
        (operators.native_gather_fwd, (feature_map, torch.tensor([1], dtype=torch.int32), False), "positions"),
        (operators.native_gather_fwd, (feature_map, torch.zeros(3, 1, dtype=torch.int64), False), "positions"),
        (operators.native_gather_fwd, (feature_map[0], torch.tensor([1]), False), "map"),
        (
            operators.native_gather_bwd,
            (vectors, vectors, inv_norm, torch.tensor([1, 12]), [2, 5, 3, 4], False, True),
            "`positions`: expected indices from 0 to 11, received 12",
        ),
        (
            operators.native_gather_bwd,
            (vectors, vectors[:1], inv_norm, torch.tensor([1, 2]), [2, 5, 3, 4], False, True),
            r"`out`: expected \[2, 2, 5\], received shape \[1, 2, 5\]",
        ),
        (operators.native_variance_fwd, (rows[:, :1].contiguous(), 1.0, 1e-4), "x"),
        (operators.native_variance_fwd, (rows.transpose(1, 2), 1.0, 1e-4), "contiguous"),
        (
            operators.native_variance_bwd,
            (torch.ones(2), rows, rows[:, 0, :4], rows[:, 0], 1.0),
            r"`mean`: expected \[2, 5\], received shape \[2, 4\]",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
