"""Native NT-Xent on the CPU against the reference."""

from __future__ import annotations

import pytest
import torch

import anomem.ops.contrast  # noqa: F401  registers the operators that opcheck is given
from anomem.backends import Impl
from anomem.errors import ArgumentError
from anomem.functional import nt_xent
from anomem.reference import nt_xent_rows
from anomem.testing import compare, draw
from tests.native.invariances import assert_same_bits_with_any_number_of_threads

SHAPES = [(1, 1, 3), (1, 2, 5), (2, 3, 7), (1, 16, 33), (3, 65, 17), (2, 200, 40), (1, 300, 130), (16, 9, 64)]


def views(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)


def both_passes(z: torch.Tensor, z_pair: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (z, z_pair)]
    rows = nt_xent(*leaves, reduction="none", impl="native")
    return [rows.detach(), *torch.autograd.grad(rows, leaves, draw(*rows.shape, seed=3).to(rows))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.005, 0.022, 0.023, 0.2, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(shape: tuple[int, int, int], tau: float, dtype: torch.dtype) -> None:
    compare(
        lambda a, b: nt_xent(a, b, temperature=tau, reduction="none", impl="native"),
        lambda a, b: nt_xent_rows(a, b, tau),
        views(*shape, dtype=dtype),
    )


def test_rounding_does_not_grow_with_the_batch() -> None:
    # 8192 rows: a gradient summed in one chain had three times plain PyTorch's error here, growing with the root of B.
    z, z_pair = views(4096, 8)

    def gradient(impl: Impl, dtype: torch.dtype) -> torch.Tensor:
        leaf = z.to(dtype).requires_grad_()
        nt_xent(leaf, z_pair.to(dtype), temperature=0.2, impl=impl).backward()
        assert leaf.grad is not None
        return leaf.grad.double()

    exact = gradient("reference", torch.float64)
    ours, plain = (float((gradient(i, torch.float32) - exact).square().mean().sqrt()) for i in ("native", "reference"))
    assert ours <= 1.5 * plain


# Below 0.0029 no fixed shift of the exponentials fits into float64: the other path is differentiated.
@pytest.mark.parametrize(("tau", "step"), [(0.002, 1e-7), (0.2, 1e-6)])
def test_gradcheck(tau: float, step: float) -> None:
    leaves = [x.requires_grad_() for x in views(2, 3, 5, dtype=torch.float64)]
    temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b, t: nt_xent(a, b, temperature=t, reduction="none", impl="native"),
        (*leaves, temperature),
        eps=step,
        rtol=1e-3,
    )


def test_learned_temperature() -> None:
    compare(
        lambda a, b, t: nt_xent(a, b, temperature=t, reduction="none", impl="native"),
        nt_xent_rows,
        (*views(2, 40, 16), torch.tensor(0.1)),
    )


@pytest.mark.parametrize("shape", [(1, 300, 20), (5, 40, 33)])
def test_same_bits_with_any_number_of_threads(shape: tuple[int, int, int]) -> None:
    assert_same_bits_with_any_number_of_threads(lambda: both_passes(*views(*shape)))


def test_one_pair_costs_nothing() -> None:
    rows, *grads = both_passes(*views(4, 1, 6))
    assert all(bool((x == 0).all()) for x in (rows, *grads))


def test_nan_reaches_its_group_only() -> None:
    z, z_pair = views(2, 5, 4)
    z[0, 2, 1] = torch.nan
    rows = nt_xent(z, z_pair, reduction="none", impl="native")
    assert bool(rows[0].isnan().all())
    assert bool(rows[1].isfinite().all())


def test_autocast_and_float16() -> None:
    z, z_pair = views(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nt_xent(z, z_pair, reduction="none", impl="native")
    assert torch.equal(cast, nt_xent(z.bfloat16(), z_pair.bfloat16(), reduction="none", impl="native"))
    assert cast.dtype == torch.float32
    with pytest.raises(ArgumentError, match="not float16"):
        nt_xent(z.half(), z_pair.half(), impl="native")


def test_a_group_of_nothing() -> None:
    for shape in ((0, 3, 4), (2, 0, 4)):
        rows, *grads = both_passes(*views(*shape))
        assert rows.numel() == 0
        assert all(x.shape == shape for x in grads)


def test_the_operator_refuses_what_it_would_misread() -> None:
    z, z_pair = views(2, 3, 4)
    forward, backward = torch.ops.anomem.native_nt_xent_fwd, torch.ops.anomem.native_nt_xent_bwd
    rows, total, inv_norm = forward(z, z_pair, None, 0.2)
    with pytest.raises(RuntimeError, match="z_pair"):
        forward(z, z_pair[:1], None, 0.2)
    with pytest.raises(RuntimeError, match="z_pair"):
        forward(z, z_pair.double(), None, 0.2)
    with pytest.raises(
        RuntimeError, match=r"`z`: expected unit stride on the last axis, received strides \[12, 1, 3\]"
    ):
        forward(z.mT.contiguous().mT, z_pair, None, 0.2)
    with pytest.raises(RuntimeError, match="total"):
        backward(rows, z, z_pair, inv_norm, total[:, :5], None, 0.2)
    with pytest.raises(RuntimeError, match="z_pair"):
        backward(rows, z, z_pair[:, :2], inv_norm, total, None, 0.2)


def test_strided_views() -> None:
    z, z_pair = views(6, 2, 8)
    z, z_pair = z.transpose(0, 1), z_pair.transpose(0, 1)
    assert torch.equal(nt_xent(z, z_pair, impl="native"), nt_xent(z.contiguous(), z_pair.contiguous(), impl="native"))


def test_opcheck_and_compile() -> None:
    z, z_pair = views(2, 5, 4)
    operators = torch.ops.anomem
    for temperature in (None, torch.tensor(0.3)):
        torch.library.opcheck(operators.native_nt_xent_fwd.default, (z, z_pair, temperature, 0.2))
        rows, total, inv_norm = operators.native_nt_xent_fwd(z, z_pair, temperature, 0.2)
        backward = (torch.ones_like(rows), z, z_pair, inv_norm, total, temperature, 0.2)
        torch.library.opcheck(operators.native_nt_xent_bwd.default, backward)
    compiled = torch.compile(lambda a, b: nt_xent(a, b, impl="native"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, z_pair), nt_xent(z, z_pair, impl="native"))


def test_double_backward_and_vmap() -> None:
    leaves = [x.requires_grad_() for x in views(1, 3, 4, dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(lambda a, b: nt_xent(a, b, impl="native"), leaves)
    z, z_pair = views(3, 4, 5)
    mapped = torch.func.vmap(lambda a, b: nt_xent(a, b, impl="native"))(z, z_pair)
    assert torch.equal(mapped, torch.stack([nt_xent(a, b, impl="native") for a, b in zip(z, z_pair, strict=True)]))


@pytest.mark.parametrize("tau", [0.005, 0.022, 0.03, 0.07])
def test_well_matched_pairs_within_budget(tau: float) -> None:
    """Where the positive dominates its row, the loss is what is left of two large numbers."""
    z, noise = views(2, 200, 40)
    compare(
        lambda a, b: nt_xent(a, b, temperature=tau, reduction="none", impl="native"),
        lambda a, b: nt_xent_rows(a, b, tau),
        (z, z + 0.05 * noise),
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e18, 1e30])
def test_bfloat16_rows_of_any_length_within_budget(scale: float) -> None:
    """Products of bfloat16 read rows at a power of two, in which rows that are long or short must stay what they are.

    Rows shorter than 1e-12 are nothing: theirs are all losses of equal logits.
    """
    compare(
        lambda a, b: nt_xent(a, b, temperature=0.1, reduction="none", impl="native"),
        lambda a, b: nt_xent_rows(a, b, 0.1),
        (draw(2, 70, 33, dtype=torch.bfloat16, seed=1, scale=scale), draw(2, 70, 33, dtype=torch.bfloat16, seed=2)),
    )


@pytest.mark.parametrize("spread", [0.3, 0.03])
def test_bfloat16_rows_that_are_nearly_one_within_budget(spread: float) -> None:
    """A collapsed representation: gradients are what is left where nearly equal rows cancel."""
    common = draw(33, seed=3)
    z, z_pair = ((common + spread * x.float()).bfloat16() for x in views(2, 150, 33))
    compare(
        lambda a, b: nt_xent(a, b, temperature=0.1, reduction="none", impl="native"),
        lambda a, b: nt_xent_rows(a, b, 0.1),
        (z, z_pair),
    )
