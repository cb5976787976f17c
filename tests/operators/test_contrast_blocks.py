"""A contrast by blocks of a batch: log-sums and gradients of two blocks, NT-Xent of all blocks, the memory's loss."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.functional import BlockwiseNTXent, contrasted_memory_backward
from anomem.nn import ContrastedMemoryLoss, HopfieldMemory
from anomem.ops import contrast_blocks as operators
from anomem.rules import Impl
from anomem.testing import assert_within_budget, draw
from tests.operators.contract import BF16, F32, F64, NATIVE, REFERENCE, cases, each

ALL = (REFERENCE, NATIVE)
OPERATORS = torch.ops.anomem


def both_passes(impl: Impl, tau: float, block: Tensor, other: Tensor | None) -> tuple[Tensor, ...]:
    """The log-sums of two blocks, and the gradient of the first as if its rows saw these alone."""
    sums: Any = R.block_log_sums if impl == "reference" else operators.log_sums
    gradient: Any = R.block_gradient if impl == "reference" else operators.gradient
    lse, other_lse = sums(block, other, tau)
    return lse, other_lse, gradient(block, other, lse, None if other is None else other_lse, tau)


@cases(
    "dtype, tau, sizes",
    {NATIVE: product(NATIVE.dtypes, [0.01, 0.2, 50.0], [(6, 5, 3), (10, 37, 5), (128, 64, 33), (514, 300, 64)])},
)
def test_two_blocks_within_budget(impl: Impl, dtype: torch.dtype, tau: float, sizes: tuple[int, int, int]) -> None:
    """Plain PyTorch is in float32, as are the kernel's products of bfloat16 rows."""
    rows, columns, features = sizes
    narrow = BF16 if dtype == BF16 else F32
    block, far = draw(rows, features, dtype=narrow), draw(columns, features, dtype=narrow, seed=1)
    for other in (far, None):
        mine = both_passes(impl, tau, block.to(dtype), None if other is None else other.to(dtype))
        plain, exact = (
            both_passes("reference", tau, *(None if x is None else x.to(wide) for x in (block, other)))
            for wide in (F32, F64)
        )
        for i, (actual, theirs, truth) in enumerate(zip(mine, plain, exact, strict=True)):
            assert actual.dtype == (dtype if i == 2 else F64)
            # Logarithms in float64 of sums in the kernel's precision.
            precision = dtype if i == 2 else F64 if dtype == F64 else F32
            rounded = theirs.to(F32 if precision == F64 else precision)
            assert_within_budget(actual.to(precision), rounded, truth, f"result {i}")


@each(NATIVE)
def test_rows_apart_in_memory_and_blocks_of_nothing(impl: Impl) -> None:
    wide = draw(20, 24)
    block, other = wide[::2, 3:19], wide[1:8, 3:19]
    for second in (other, None, other[:0]):
        packed = [None if x is None else x.contiguous() for x in (block, second)]
        for one, two in zip(
            both_passes(impl, 0.2, block, second), both_passes(impl, 0.2, packed[0], packed[1]), strict=True
        ):
            assert torch.equal(one, two)
    lse, other_lse = operators.log_sums(block[:0], other, 0.2)
    assert lse.shape == (0,)
    assert bool((other_lse == -torch.inf).all())
    sums = draw(10).double()
    assert not operators.gradient(block, other[:0], sums, sums[:0], 0.2).any()


@each(NATIVE)
def test_the_operators_pass_opcheck(impl: Impl) -> None:
    block, other = draw(6, 5), draw(7, 5, seed=1)
    sums, others = draw(6).double(), draw(7).double()
    for second, theirs in ((other, others), (None, None)):
        torch.library.opcheck(OPERATORS.native_contrast_block_fwd, (block, second, 0.2))
        torch.library.opcheck(OPERATORS.native_contrast_block_bwd, (block, second, sums, theirs, 0.2))


def all_blocks(z: Tensor, z_pair: Tensor, tau: float, block: int, impl: Impl) -> tuple[Tensor, Tensor]:
    """Loss and gradient [2, B, d] of NT-Xent by blocks."""
    contrast = BlockwiseNTXent(lambda some: (z[some], z_pair[some]), len(z), temperature=tau, block=block, impl=impl)
    found = zip(*(contrast.gradients(number) for number in range(len(contrast.blocks))), strict=True)
    return contrast.loss, torch.stack([torch.cat(view) for view in found])


@cases("dtype, tau", {one: product([F32, F64], [0.01, 0.2, 5.0]) for one in ALL})
@pytest.mark.parametrize("sizes", [(1, 4, 3), (5, 3, 2), (130, 40, 129), (150, 17, 32), (40, 6, 1)])
def test_all_blocks_are_nt_xent(impl: Impl, dtype: torch.dtype, tau: float, sizes: tuple[int, int, int]) -> None:
    """A zero row among them; B, d and the pairs of a block."""
    batch, features, block = sizes
    z, noise = draw(batch, features), draw(batch, features, seed=1)
    z_pair = z + noise / 2
    if batch > 3:
        z[2], z_pair[3] = 0, 0

    def at_once(wide: torch.dtype) -> tuple[Tensor, Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in (z, z_pair)]
        loss = R.nt_xent_rows(*(x[None] for x in leaves), tau).mean()
        return loss.detach(), torch.stack(torch.autograd.grad(loss, leaves))

    loss, gradient = all_blocks(z.to(dtype), z_pair.to(dtype), tau, block, impl)
    plain, exact = at_once(F32), at_once(F64)
    assert_within_budget(loss.to(dtype), plain[0], exact[0], "loss")
    assert_within_budget(gradient, plain[1], exact[1], "gradient")


@each(*ALL)
def test_positives_that_dominate_keep_their_digits(impl: Impl) -> None:
    """Losses of 1e-20 and their gradients, relative to their own size."""
    z = torch.eye(6, 8)
    z_pair = z + draw(6, 8) / 1000
    loss, gradient = all_blocks(z, z_pair, 0.02, 2, impl)
    leaves = [x.double().requires_grad_() for x in (z, z_pair)]
    exact = R.nt_xent_rows(*(x[None] for x in leaves), 0.02).mean()
    assert exact < 1e-19
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-4, atol=0)
    slopes = torch.stack(torch.autograd.grad(exact, leaves))
    assert (gradient.double() - slopes).norm() < 1e-3 * slopes.norm()


@each(*ALL)
def test_nan_reaches_every_row(impl: Impl) -> None:
    z, z_pair = draw(8, 5), draw(8, 5, seed=1)
    z[5, 2] = torch.nan
    loss, gradient = all_blocks(z, z_pair, 0.2, 3, impl)
    assert bool(loss.isnan())
    assert bool(gradient.isnan().all())


def memory_of(features: int, dtype: torch.dtype, **options: Any) -> HopfieldMemory:
    memory = HopfieldMemory(features, 7, **options).to(dtype)
    with torch.no_grad():
        memory.prototypes.copy_(draw(7, features, seed=9))
        if memory.values is not None:
            memory.values.copy_(draw(7, features, seed=10))
    return memory


OPTIONS: dict[str, dict[str, Any]] = {
    "learned beta": {"learn_beta": True},
    "two steps": {"steps": 2},
    "unit rows": {"normalize": "l2"},
    "values": {"value_features": 6},
    "shrink": {"shrink": 0.05},
}


@cases("dtype, options", {one: [*product([F32, BF16, F64], ["plain"]), *product([F32], OPTIONS)] for one in ALL})
@pytest.mark.parametrize("anomalies", [False, True])
def test_the_memorys_loss_and_its_backward_pass(
    impl: Impl, dtype: torch.dtype, options: str, anomalies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the graph of the whole batch; the blocks are of some pairs."""
    monkeypatch.setattr(AF.contrast_blocks, "_FEWEST_PAIRS", 16)
    monkeypatch.setattr(AF.contrast_blocks, "BLOCK", 1)
    wide = F64 if dtype == F64 else F32
    z, z_pair = (draw(45, 6, dtype=dtype, seed=seed) for seed in (1, 2))
    is_normal = torch.arange(45) % 4 > 0 if anomalies else None
    # A hinge that is not flat at the answers' deviation.
    criterion = ContrastedMemoryLoss(variance_weight=3.0, symmetric=options != "values", impl=impl)
    expected = memory_of(6, wide, **OPTIONS.get(options, {}))
    leaves = [x.to(wide)[None].requires_grad_() for x in (z, z_pair)]
    total, *terms = criterion(*leaves, expected, is_normal)
    (0.7 * total).backward()
    memory = memory_of(6, wide, **OPTIONS.get(options, {}))
    for name, parameter in memory.named_parameters():  # gradients are added to those that are there
        parameter.grad = torch.ones_like(parameter)
        dict(expected.named_parameters())[name].grad.add_(1)  # type: ignore[union-attr]
    found = criterion.backward_by_blocks(z, z_pair, memory, is_normal, weight=0.7)
    tolerance = {F32: 2e-5, BF16: 1e-2, F64: 1e-12}[dtype]
    for one, other in zip(found, (total, *terms), strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other.detach(), rtol=2e-6, atol=1e-7)
    for view, leaf in zip((z, z_pair), leaves, strict=True):
        assert leaf.grad is not None
        assert (view.to(wide) - leaf.grad[0]).norm() < tolerance * leaf.grad.norm()
    for name, parameter in memory.named_parameters():
        torch.testing.assert_close(
            parameter.grad, dict(expected.named_parameters())[name].grad, rtol=2e-5, atol=1e-6, msg=name
        )


def test_vectors_in_bfloat16_get_gradients_that_are_rounded_once() -> None:
    z, z_pair = (draw(40, 6, dtype=BF16, seed=seed) for seed in (1, 2))
    memory = memory_of(6, F32)
    rounded, exact = ([x.to(dtype) for x in (z, z_pair)] for dtype in (BF16, F32))
    for views in (rounded, exact):
        contrasted_memory_backward(*views, memory, block=16)
    for mine, whole in zip(rounded, exact, strict=True):
        assert torch.equal(mine, whole.to(BF16))


@cases("dtype", {one: [(BF16,), (torch.float16,)] for one in ALL})
def test_short_floats_are_summed_in_float32_and_rounded_once(impl: Impl, dtype: torch.dtype) -> None:
    z, z_pair = (draw(300, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    with torch.autocast("cpu", dtype=dtype):
        loss, gradient = all_blocks(z, z_pair, 0.2, 7, impl)
    wide_loss, wide = all_blocks(z.float(), z_pair.float(), 0.2, 7, impl)
    assert gradient.dtype == dtype
    assert torch.equal(loss, wide_loss)
    assert torch.equal(gradient, wide.to(dtype))


def test_nothing_has_a_graph() -> None:
    """Though the vectors do: the second pass over the encoder has one of its own."""
    encode, x = torch.nn.Linear(4, 3), draw(9, 4)
    contrast = BlockwiseNTXent(lambda some: (encode(x[some]), encode(-x[some])), 9, block=4)
    assert not contrast.loss.requires_grad
    assert not any(gradient.requires_grad for gradient in contrast.gradients(1))


@each(NATIVE)
def test_memory_does_not_grow_with_the_batch(impl: Impl) -> None:
    """But for the gradients in the vectors' dtype and a few numbers for each row."""
    from benchmarks.harness.measure import peak_bytes

    memory, peaks = memory_of(16, F32), {}
    for batch in (2048, 16384):
        z, z_pair = (draw(batch, 16, dtype=BF16, seed=seed) for seed in (1, 2))
        peaks[batch] = peak_bytes(
            lambda z=z, z_pair=z_pair: contrasted_memory_backward(z, z_pair, memory, block=512, impl=impl), "cpu"
        )
    a_row_in_bfloat16, numbers_of_a_row = 2 * 16, 8 * 8
    rows = 2 * (16384 - 2048)
    assert peaks[16384] - peaks[2048] < rows * (a_row_in_bfloat16 + 2 * numbers_of_a_row)


def wrong_pairs() -> dict[str, Any]:
    """What `pairs` may give by mistake."""
    z, z_pair = draw(5, 4), draw(5, 4, seed=1)
    return {
        "a tensor": lambda some: z[some],
        "one axis": lambda some: (z[some, 0], z_pair[some, 0]),
        "three axes": lambda some: (z[some, None], z_pair[some, None]),
        "other widths": lambda some: (z[some], z_pair[some, :3]),
        "other dtypes": lambda some: (z[some], z_pair[some].double()),
        "all of them": lambda some: (z, z_pair),
        "integers": lambda some: (z[some].long(), z_pair[some].long()),
        "arrays": lambda some: (z[some].numpy(), z_pair[some].numpy()),
        "other widths later": lambda some: (z[some, : 4 - some.start], z_pair[some, : 4 - some.start]),
    }


@pytest.mark.parametrize("mistake", wrong_pairs())
def test_other_vectors_than_described(mistake: str) -> None:
    with pytest.raises(ArgumentError, match=r"`pairs`: expected .* received"):
        BlockwiseNTXent(wrong_pairs()[mistake], 5, block=2)


def test_wrong_numbers_of_a_contrast() -> None:
    z, z_pair = draw(5, 4), draw(5, 4, seed=1)

    def pairs(some: slice) -> tuple[Tensor, Tensor]:
        return z[some], z_pair[some]

    for given, options, message in (
        ((z, z_pair), {}, "`pairs`: expected a function of a slice, received Tensor"),
        ((pairs, z), {}, r"`batch`: expected an integer ≥ 1, received a tensor of shape \[5, 4\]"),
        ((pairs, 6), {}, r"`pairs`: expected two alike floating tensors \[6, d\]"),
        ((pairs, 5), {"block": "64"}, "`block`"),
        ((pairs, 5), {"temperature": torch.nn.Parameter(torch.tensor(0.2))}, "`temperature`"),
    ):
        with pytest.raises(ArgumentError, match=message):
            BlockwiseNTXent(*given, **options)  # type: ignore[arg-type]
    for number in (1, -1, slice(0, 2)):
        with pytest.raises(ArgumentError, match="`number`"):
            BlockwiseNTXent(pairs, 5).gradients(number)  # type: ignore[arg-type]


def test_wrong_memories() -> None:
    for memory, message in (
        (draw(3, 4), "`memory`: expected a function"),
        (lambda queries: queries[:, :2], r"`memory`: expected answers \[\d+, 4\]"),
        (lambda queries: (queries, queries), "`memory`"),
        (lambda queries: queries.detach(), "`memory`: expected answers with a graph"),
    ):
        z, z_pair = draw(5, 4), draw(5, 4, seed=1)
        with pytest.raises(ArgumentError, match=message):
            contrasted_memory_backward(z, z_pair, memory)  # type: ignore[arg-type]
        assert torch.equal(z, draw(5, 4))


def test_wrong_arguments() -> None:
    z, z_pair = draw(5, 4), draw(5, 4, seed=1)
    memory = memory_of(4, F32)
    for arguments, options, name in (
        ((z[:1], z_pair[:1]), {}, "z"),
        ((z, z_pair[:4]), {}, "z_pair"),
        ((z, z_pair.double()), {}, "z_pair"),
        ((z.clone().requires_grad_(), z_pair), {}, "z"),
        ((z, z_pair), {"is_normal": torch.ones(4, dtype=torch.bool)}, "is_normal"),
        ((z, z_pair), {"temperature": 0.0}, "temperature"),
        ((z, z_pair), {"temperature": torch.tensor(0.2)}, "temperature"),
        ((z, z_pair), {"block": 0}, "block"),
        ((z, z_pair), {"variance_gamma": 0.0}, "variance_gamma"),
        ((z, z_pair), {"variance_weight": -1.0}, "variance_weight"),
        ((z, z), {}, "z_pair"),
        ((z[:1].expand(5, 4), z_pair), {}, "z"),
    ):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            contrasted_memory_backward(*arguments, memory, **options)  # type: ignore[arg-type]
    for criterion, name in (
        (ContrastedMemoryLoss(negatives="both"), "negatives"),
        (ContrastedMemoryLoss(), "memory"),
        (ContrastedMemoryLoss(), "z"),
        (ContrastedMemoryLoss(variance_weight=0.0), "memory"),
    ):
        wrong = torch.nn.Identity() if criterion.variance_weight else memory_of(4, BF16)
        chosen = {"memory": wrong, "z": memory_of(3, F32)}.get(name, memory)
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            criterion.backward_by_blocks(z, z_pair, chosen)  # type: ignore[arg-type]
    assert torch.equal(z, draw(5, 4))  # nothing was overwritten
