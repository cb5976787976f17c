"""Native retrieval on the CPU against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem.backends import Impl
from anomem.errors import ArgumentError
from anomem.functional import hopfield_retrieve
from anomem.testing import compare, draw
from tests.native.invariances import assert_compiles_for_any_number_of_rows, assert_same_bits_with_any_number_of_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# N, M, d, dv (0: the normalised prototypes are the values), normalize. Every N, M and d meets a tail of some block: of
# the vectors, of the panels, of the rows of a register block, of the chunks of rows.
SHAPES = [
    (0, 3, 7, 0, "layer"),
    (1, 1, 1, 0, "none"),
    (5, 3, 7, 4, "layer"),
    (1, 70, 64, 0, "l2"),
    (5, 600, 100, 0, "layer"),
    (513, 1, 64, 9, "l2"),
    (513, 70, 7, 0, "none"),
    (513, 70, 64, 0, "layer"),
    (513, 600, 100, 33, "l2"),
    (1100, 70, 64, 0, "layer"),
    (1100, 3, 1, 5, "none"),
]


def tensors(n: int, m: int, d: int, dv: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """query [n, d], prototypes [m, d], values [m, dv] or None."""
    values = draw(m, dv, dtype=dtype, seed=3) if dv else None
    return [draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2), values]


def test_rounding_does_not_grow_with_the_memory() -> None:
    # Read from 8192 prototypes in one chain, a value had eight times plain PyTorch's error, growing with the root of M.
    query, prototypes, _ = tensors(64, 8192, 16, 0)
    assert query is not None
    assert prototypes is not None
    upstream = draw(64, 16, seed=4)

    def both(impl: Impl, dtype: torch.dtype) -> Tensor:
        leaf = query.to(dtype).requires_grad_()
        out = hopfield_retrieve(leaf, prototypes.to(dtype), impl=impl)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(dtype))
        return torch.stack([out.detach(), gradient]).double()

    exact = both("reference", torch.float64)
    native, plain = (
        (both(impl, torch.float32) - exact).square().mean((1, 2)).sqrt() for impl in ("native", "reference")
    )
    assert bool((native <= 1.5 * plain).all()), (native, plain)


def pair(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """query [n, d], prototypes [m, d]."""
    return draw(n, d, seed=1), draw(m, d, seed=2)


def read(impl: str, **options: Any) -> Any:
    """Retrieval with its lse as a function of tensors alone."""

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None = None, beta: Tensor | None = None) -> Any:
        arguments = {"beta": beta, **options} if beta is not None else options
        return hopfield_retrieve(query, prototypes, values=values, return_lse=True, impl=impl, **arguments)

    return run


def each_beta(retrieve: Any) -> Any:
    """A retrieval with several betas, [K], as a function of tensors alone."""

    def run(query: Tensor, prototypes: Tensor, values: Tensor | None, betas: Tensor) -> tuple[Tensor, ...]:
        results = [retrieve(query, prototypes, values, beta) for beta in betas]
        return tuple(torch.stack(result) for result in zip(*results, strict=True))

    return run


def both_passes(inputs: list[Tensor | None], beta: float = 0.7) -> list[Tensor]:
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    factor = torch.tensor(beta, requires_grad=True)
    out, lse = read("native")(*leaves, factor)
    wanted = [*(x for x in leaves if x is not None), factor]
    upstream = [draw(*out.shape, seed=4).to(out), draw(*lse.shape, seed=5).to(lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], wanted, upstream)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(shape: tuple[int, int, int, int, str], dtype: torch.dtype) -> None:
    """Results and all gradients, those through lse included."""
    *sizes, normalize = shape
    options = {"normalize": normalize, "beta": 0.7}
    compare(read("native", **options), read("reference", **options), tensors(*sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 0), (5, 600, 100, 7), (513, 70, 33, 0)])
def test_learned_beta_within_budget(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Sixteen betas: the gradient to one is one number, whose error in plain PyTorch may be tiny by chance."""
    query, prototypes, values = tensors(*sizes, dtype=dtype)
    betas = torch.linspace(0.1, 1, 16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    compare(each_beta(read("native")), each_beta(read("reference")), [query, prototypes, values, betas])


@pytest.mark.parametrize("beta", [0.0, -0.5, 0.01, 20.0])
def test_given_beta(beta: float) -> None:
    """Of many queries: a large beta decides between prototypes that are nearly tied, and few such draws are luck."""
    compare(read("native", beta=beta), read("reference", beta=beta), tensors(3000, 70, 24, 0))


@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_two_steps(normalize: str) -> None:
    inputs = [*tensors(40, 70, 24, 5), torch.tensor(0.3)]
    options = {"steps": 2, "normalize": normalize}
    compare(read("native", **options), read("reference", **options), inputs)


def test_strided_queries() -> None:
    """Rows of a wider tensor, columns of a transposed one, an expanded row, leading axes."""
    wide, prototypes = draw(30, 40, seed=1), draw(9, 16, seed=2)
    for query in (wide[::2, 3:19], draw(16, 30, seed=1).T, draw(16, seed=1).expand(30, 16), draw(2, 3, 16)[:, ::2]):
        strided, compact = hopfield_retrieve(query, prototypes, impl="native"), query.contiguous()
        assert torch.equal(strided, hopfield_retrieve(compact, prototypes, impl="native"))
        compare(read("native"), read("reference"), [query, prototypes])


@pytest.mark.parametrize("normalize", ["layer", "l2", "none"])
def test_gradcheck(normalize: str) -> None:
    leaves = [x.requires_grad_() for x in tensors(4, 5, 6, 3, torch.float64) if x is not None]
    beta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(read("native", normalize=normalize), (*leaves, beta))
    assert torch.autograd.gradcheck(read("native", normalize=normalize), (*leaves[:2], None, beta))


def test_double_backward() -> None:
    leaves = [x.requires_grad_() for x in tensors(3, 4, 5, 0, torch.float64) if x is not None]
    beta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(read("native"), (*leaves, None, beta))


@pytest.mark.parametrize("sizes", [(5, 3, 7, 4), (1300, 70, 24, 0), (300, 600, 33, 9)])
def test_same_bits_with_any_number_of_threads(sizes: tuple[int, int, int, int]) -> None:
    assert_same_bits_with_any_number_of_threads(lambda: both_passes(tensors(*sizes)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_a_bad_query_spoils_its_own_row_only(normalize: str, bad: float) -> None:
    query, prototypes = pair(20, 9, 8)
    query[7, 3] = bad
    out, lse = read("native", normalize=normalize)(query, prototypes)
    expected, expected_lse = read("reference", normalize=normalize)(query, prototypes)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    assert bool(out[7].isnan().all())
    leaf = query.requires_grad_()
    (gradient,) = torch.autograd.grad(read("native", normalize=normalize)(leaf, prototypes)[0].sum(), leaf)
    assert bool(gradient[7].isnan().all())
    rest = torch.arange(20) != 7
    assert bool(gradient[rest].isfinite().all() and out[rest].isfinite().all())


@pytest.mark.parametrize("beta", [-100.0, 3.0, 100.0])
def test_logits_that_overflow_an_exponential_within_budget(beta: float) -> None:
    """Logits up to 1e5 and down to −1e5, on both sides of what the backward pass makes from lse.

    Of whole numbers, whose products are exact: otherwise rounding decides between prototypes that are nearly tied, and
    the error is luck.
    """
    compare(
        read("native", normalize="none", beta=beta),
        read("reference", normalize="none", beta=beta),
        [draw(12, 8, scale=10.0).round(), draw(9, 8, seed=2, scale=10.0).round()],
    )


def test_opcheck() -> None:
    query, prototypes, values = tensors(6, 5, 4, 3)
    beta, operators = torch.tensor(0.7), torch.ops.anomem
    hopfield_retrieve(query, prototypes, impl="native")
    for v, b in ((values, beta), (None, None)):
        arguments = (query, prototypes, v, b, 0.5, 1)
        torch.library.opcheck(operators.native_retrieve_fwd.default, arguments)
        out, lse = operators.native_retrieve_fwd(*arguments)
        torch.library.opcheck(
            operators.native_retrieve_bwd.default, (torch.ones_like(out), torch.ones_like(lse), *arguments, out, lse)
        )


def test_compiles_in_one_graph_with_any_number_of_queries() -> None:
    def loss(query: Tensor, prototypes: Tensor) -> Tensor:
        out, lse = hopfield_retrieve(query, prototypes, return_lse=True, impl="native")
        return (out**2).sum() + lse.sum()

    assert_compiles_for_any_number_of_rows(loss, draw(9, 8, seed=2))


def test_autocast() -> None:
    query, prototypes = pair(6, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hopfield_retrieve(query, prototypes, impl="native")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, hopfield_retrieve(query.bfloat16(), prototypes.bfloat16(), impl="native"))


def test_vmap() -> None:
    query, prototypes = draw(3, 6, 4, seed=1), draw(3, 5, 4, seed=2)
    shared = torch.func.vmap(lambda q: hopfield_retrieve(q, prototypes[0], impl="native"))(query)
    assert torch.equal(shared, torch.stack([hopfield_retrieve(q, prototypes[0], impl="native") for q in query]))
    own = torch.func.vmap(lambda q, k: hopfield_retrieve(q, k, impl="native"))(query, prototypes)
    pairs = zip(query, prototypes, strict=True)
    assert torch.equal(own, torch.stack([hopfield_retrieve(q, k, impl="native") for q, k in pairs]))


def test_errors() -> None:
    query, prototypes = pair(6, 5, 4)
    with pytest.raises(ArgumentError, match=r"impl.*float16"):
        hopfield_retrieve(query.half(), prototypes.half(), impl="native")
    operator = torch.ops.anomem.native_retrieve_fwd
    for arguments, message in (
        ((query, prototypes[:, :3].contiguous(), None, None, 0.5, 1), "keys"),
        ((query, prototypes.double(), None, None, 0.5, 1), "keys"),
        ((query, prototypes.T.contiguous().T, None, None, 0.5, 1), "keys"),
        (
            (query, prototypes[:0], None, None, 0.5, 1),
            r"`keys`: expected \[M, d\] with M >= 1, d >= 1, received shape \[0, 4\]",
        ),
        ((query, prototypes, prototypes[:3].contiguous(), None, 0.5, 1), "values"),
        ((query, prototypes, None, None, 0.5, 3), "normalize"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_queries_do_not_see_each_other() -> None:
    """Bitwise: the same place in a block of rows, other neighbours."""
    query, prototypes = pair(1300, 70, 24)
    other = draw(1300, 24, seed=9)
    other[::3] = query[::3]
    here, there = (hopfield_retrieve(q, prototypes, impl="native") for q in (query, other))
    assert torch.equal(here[::3], there[::3])


def test_permutations() -> None:
    """Of the queries: the same rows in the new order. Of the prototypes: the same numbers within the budget."""
    query, prototypes = pair(60, 40, 24)
    order = torch.randperm(40)
    compare(lambda q, k: read("native")(q, k[order]), read("reference"), [query, prototypes])
    order = torch.randperm(60)
    compare(lambda q, k: read("native")(q[order], k), lambda q, k: read("reference")(q[order], k), [query, prototypes])


def test_infinite_beta_reads_the_nearest_prototype() -> None:
    query, prototypes = pair(60, 40, 24)
    nearest = (query @ prototypes.T).argmax(dim=1)
    out = hopfield_retrieve(query, prototypes, normalize="none", beta=1e6, impl="native")
    assert torch.equal(out, prototypes[nearest])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa: str) -> None:
    code = (
        "import torch\nfrom anomem.functional import hopfield_retrieve\nfrom anomem.testing import compare, draw\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "  for n, m, d in ((140, 70, 37), (1030, 9, 64)):\n"
        "    compare(*(lambda q, k, i=i: hopfield_retrieve(q, k, return_lse=True, impl=i)\n"
        "              for i in ('native', 'reference')),\n"
        "            (draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ANOMEM_CPU": isa}, capture_output=True, text=True, check=False
    )
    if "cannot run it" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dv", [0, 9])
@pytest.mark.parametrize("spread", [0.3, 0.03, 0.01])
def test_bfloat16_prototypes_that_are_nearly_one_within_budget(spread: float, dv: int) -> None:
    """A collapsed memory: its gradient to the queries is what is left where nearly equal prototypes cancel.

    With their mean among what is rounded it was off by 20% and more. Without lse, whose gradient is the mean itself.
    """
    query, prototypes, values = tensors(300, 90, 33, dv, torch.bfloat16)
    assert query is not None
    assert prototypes is not None
    prototypes = (draw(33, seed=7) + spread * prototypes.float()).bfloat16()
    native, reference = (
        lambda q, k, v, impl=impl: hopfield_retrieve(q, k, values=v, beta=0.7, impl=impl)
        for impl in ("native", "reference")
    )
    compare(native, reference, [query, prototypes, values])
    compare(read("native", beta=0.7), read("reference", beta=0.7), [query, prototypes, values])
