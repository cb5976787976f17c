"""TF32: when torch's switches allow it, and that its operands are rounded as cuBLAS rounds them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.functional import hopfield_retrieve, info_nce, nt_xent
from anomem.kernels import primitives
from anomem.kernels.primitives import allows_tf32, precision, round_to_tf32
from anomem.testing import draw, error

MATMUL = torch.backends.cuda.matmul
SWITCHES: dict[str, Callable[[], None]] = {
    "old on": lambda: setattr(MATMUL, "allow_tf32", True),
    "old off": lambda: setattr(MATMUL, "allow_tf32", False),
    "old high": lambda: torch.set_float32_matmul_precision("high"),
    "old highest": lambda: torch.set_float32_matmul_precision("highest"),
    "products tf32": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "products ieee": lambda: setattr(MATMUL, "fp32_precision", "ieee"),
    "products none": lambda: setattr(MATMUL, "fp32_precision", "none"),
    "all tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The switches as a process starts with them, before and after."""

    def reset() -> None:
        MATMUL.allow_tf32 = False
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        MATMUL.fp32_precision = "none"

    reset()
    yield
    reset()


@pytest.mark.parametrize("names", [*itertools.product(SWITCHES, repeat=2)], ids=", then ".join)
def test_any_mix_of_switches_is_understood(names: tuple[str, str]) -> None:
    for name in names:
        SWITCHES[name]()
    allowed = MATMUL.fp32_precision == "tf32"  # what cuBLAS asks
    assert allows_tf32() is allowed
    assert precision(torch.float32) == ("tf32" if allowed else "ieee")
    assert precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("old on", True), ("old high", True), ("products tf32", True), ("all tf32", True), ("old off", False)],
)
def test_each_switch_alone(name: str, allowed: bool) -> None:
    SWITCHES[name]()
    assert allows_tf32() is allowed


@pytest.mark.parametrize("name", ["products tf32", "all tf32"])
def test_the_new_switches_run_a_kernel(name: str) -> None:
    """Reading the old switch would raise here."""
    SWITCHES[name]()
    query, prototypes = draw(20, 32, seed=1), draw(10, 32, seed=2)
    assert hopfield_retrieve(query, prototypes, impl="triton").isfinite().all()


@triton.jit
def round_kernel(x, y, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x rounded to TF32."""
    at = tl.arange(0, COUNT)
    tl.store(y + at, round_to_tf32(tl.load(x + at)))


def rounded(x: Tensor) -> Tensor:
    """float32 → the nearest TF32 number, ties away from zero."""
    return ((x.float().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def test_rounding_keeps_what_is_no_number() -> None:
    largest_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([draw(124), torch.tensor([math.inf, -math.inf, 0.0]), largest_nan])
    y = torch.empty_like(x)
    round_kernel[(1,)](x, y, 128)
    assert torch.equal(y[:127], rounded(x)[:127])
    assert y[127].isnan()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b as cuBLAS computes it with TF32."""
    return (rounded(a).double() @ rounded(b).double()).float()


def retrieval(query: Tensor, prototypes: Tensor, matmul: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Output and log-sum-exp with LayerNorm, products by `matmul`."""
    unit, keys = (torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5) for x in (query, prototypes))
    scores = matmul(unit, keys.mT) / math.sqrt(query.shape[1])
    return [matmul(scores.softmax(1), keys), scores.logsumexp(1)]


def contrast(z: Tensor, z_pair: Tensor, matmul: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Losses of NT-Xent at temperature 0.1, and the gradient of the first view by hand: its products are `matmul`s."""
    x = torch.cat([z, z_pair])
    length = x.norm(dim=1, keepdim=True)
    unit = x / length
    logits = matmul(unit, unit.mT) / 0.1
    logits.fill_diagonal_(-math.inf)
    pairs = (torch.arange(len(x)) + len(z)) % len(x)
    rows = torch.arange(len(x))
    lse = logits.logsumexp(1)
    weights = (logits - lse[:, None]).exp()
    weights[rows, pairs] -= 1
    du = matmul(weights + weights.mT, unit) / 0.1
    dx = (du - unit * (unit * du).sum(1, keepdim=True)) / length
    return [lse - logits[rows, pairs], dx[: len(z)]]


def kernel_contrast(z: Tensor, z_pair: Tensor) -> list[Tensor]:
    leaf = z.clone().requires_grad_()
    rows = nt_xent(leaf, z_pair, temperature=0.1, reduction="none", impl="triton")
    rows.sum().backward()
    assert leaf.grad is not None
    return [rows.detach().flatten(), leaf.grad]


def kernel_retrieval(query: Tensor, prototypes: Tensor) -> list[Tensor]:
    return [*hopfield_retrieve(query, prototypes, normalize="layer", return_lse=True, impl="triton")]


@pytest.mark.parametrize(
    ("kernel", "formula", "shapes"),
    [
        (kernel_retrieval, retrieval, [(200, 64), (90, 64)]),
        (kernel_contrast, contrast, [(100, 48), (100, 48)]),
    ],
)
def test_errors_are_those_of_torch(
    kernel: Callable[..., list[Tensor]], formula: Callable[..., list[Tensor]], shapes: list[tuple[int, int]]
) -> None:
    MATMUL.fp32_precision = "tf32"
    inputs = [draw(*shape, seed=seed).abs() for seed, shape in enumerate(shapes)]  # truncation is biased where all > 0
    exact = formula(*(x.double() for x in inputs), torch.matmul)
    torchs = formula(*inputs, product)
    for actual, theirs, truth in zip(kernel(*inputs), torchs, exact, strict=True):
        assert 0 < error(actual, truth) <= 1.5 * error(theirs, truth)


def test_info_nce_rounds_both_sides() -> None:
    """With indices, and the gradient of the columns."""
    MATMUL.fp32_precision = "tf32"
    rows, columns = draw(70, 40, seed=1).abs(), draw(90, 40, seed=2).abs()
    positive = torch.arange(70)

    def gradient(x: Tensor, y: Tensor, **how: str) -> list[Tensor]:
        y = y.clone().requires_grad_()
        loss = info_nce(x, y, positive, temperature=0.1, reduction="none", **how)  # type: ignore[arg-type]
        loss.sum().backward()
        assert y.grad is not None
        return [loss.detach(), y.grad]

    exact = gradient(rows.double(), columns.double(), impl="reference")
    for actual, truth in zip(gradient(rows, columns, impl="triton"), exact, strict=True):
        assert error(actual, truth) < 8e-4


def test_without_rounding_the_errors_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates the operands of a TF32 product, as the matrix unit does."""
    monkeypatch.setattr(primitives, "round_to_tf32", lambda x: x)
    with pytest.raises(AssertionError):
        test_errors_are_those_of_torch(kernel_retrieval, retrieval, [(200, 64), (90, 64)])
    with pytest.raises(AssertionError):
        test_errors_are_those_of_torch(kernel_contrast, contrast, [(100, 48), (100, 48)])
    with pytest.raises(AssertionError):
        test_info_nce_rounds_both_sides()
