"""Retrieval's Triton kernels in the interpreter, forward and backward, held to the float64 budget.

Exact float32 takes the chunked scheme, whose scratch is made small here so that a few queries fill several chunks.
bfloat16 and float16 rows of more than 256 features and a memory of up to 256 prototypes take the resident forward.
float32 where TF32 is allowed takes the flash scheme; the interpreter multiplies it exactly, so its budget stays sharp.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem import reference as R
from anomem.errors import ArgumentError
from anomem.testing import compare, draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMALIZE = ("none", "layer", "l2")


@pytest.fixture(autouse=True)
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.kernels import retrieve_chunked

    monkeypatch.setattr(retrieve_chunked, "SCRATCH_BYTES", 1)


@pytest.fixture(params=["chunked", "flash"])
def scheme(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which scheme float32 rows take; the flash scheme serves d, dv ≤ 256."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "flash"
    yield str(request.param)
    torch.backends.cuda.matmul.allow_tf32 = before


def kernel(**options: object) -> Callable[..., tuple[Tensor, ...]]:
    def run(query: Tensor, keys: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
        return AF.hopfield_retrieve(query, keys, values=values, return_lse=True, impl="triton", **options)

    return run


def reference(**options: object) -> Callable[..., tuple[Tensor, ...]]:
    def run(query: Tensor, keys: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
        read = R.hopfield_retrieve(query, keys, values=values, **options)
        return read.out, read.lse

    return run


def memory(n: int, m: int, d: int, dv: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Query, keys and values."""
    values = None if dv is None else draw(m, dv, dtype=dtype, seed=3)
    return [draw(n, d, dtype=dtype, seed=1), draw(m, d, dtype=dtype, seed=2), values]


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [(torch.float32, "chunked"), (torch.float32, "flash"), (torch.bfloat16, "flash"), (torch.float16, "flash")],
    indirect=["scheme"],
)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("shape", [(17, 5, 16, None), (65, 70, 24, 40), (17, 70, 100, None), (129, 5, 300, 20)])
def test_rows_and_gradients(
    shape: tuple[int, int, int, int | None], normalize: str, dtype: torch.dtype, scheme: str
) -> None:
    beta = {"none": 0.3, "layer": 0.2, "l2": 4.0}[normalize]
    options = {"beta": beta, "normalize": normalize}
    compare(kernel(**options), reference(**options), memory(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(35, 70, 300, None), (9, 5, 260, 300), (33, 257, 270, None)])
def test_long_rows_with_and_without_a_resident_memory(
    shape: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    compare(kernel(beta=0.2, normalize="layer"), reference(beta=0.2, normalize="layer"), memory(*shape, dtype))


@pytest.mark.parametrize("shape", [(1, 70, 64, None), (65, 1, 16, 24), (2, 33, 64, 16)])
def test_one_query_and_one_prototype(shape: tuple[int, int, int, int | None], scheme: str) -> None:
    compare(kernel(), reference(), memory(*shape))


@pytest.mark.parametrize("dv", [None, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_beta(dtype: torch.dtype, dv: int | None, scheme: str) -> None:
    """Of any sign, and 0. Several memories at once: the gradient to one beta is one number, whose error is luck."""
    count = 6
    betas = draw(count, seed=4)
    betas[0] = 0

    def each(retrieve: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def run(query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor) -> tuple[Tensor, ...]:
            parts = [retrieve(beta[i])(query[i], keys[i], None if values is None else values[i]) for i in range(count)]
            return tuple(torch.stack(part) for part in zip(*parts, strict=True))

        return run

    inputs = [
        draw(count, 33, 24, dtype=dtype, seed=1),
        draw(count, 35, 24, dtype=dtype, seed=2),
        None if dv is None else draw(count, 35, dv, dtype=dtype, seed=3),
        betas,
    ]
    compare(each(lambda beta: kernel(beta=beta)), each(lambda beta: reference(beta=beta)), inputs)


def test_steps(scheme: str) -> None:
    compare(kernel(beta=0.5, steps=2), reference(beta=0.5, steps=2), memory(17, 35, 24, 16))


def test_strided_rows_are_read_in_place(scheme: str) -> None:
    query, keys, _ = memory(33, 35, 48)
    compare(kernel(), reference(), [query[:, 8:32], keys[:, 8:32]])
    wide = torch.full((33, 96), float("nan"))
    wide[:, 8:32] = query[:, 8:32]
    out, lse = kernel()(wide[:, 8:32], keys[:, 8:32])
    plain = kernel()(query[:, 8:32].contiguous(), keys[:, 8:32])
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])


def test_only_the_log_sum_has_a_gradient(scheme: str) -> None:
    compare(lambda q, k: kernel()(q, k)[1], lambda q, k: reference()(q, k)[1], memory(17, 35, 24)[:2])


@pytest.mark.parametrize("dv", [None, 5])
def test_no_query(dv: int | None, scheme: str) -> None:
    query, keys, values = memory(0, 5, 16, dv)
    leaves = [x.requires_grad_() for x in (query, keys, values, torch.tensor(0.5)) if x is not None]
    out, lse = AF.hopfield_retrieve(query, keys, values=values, beta=leaves[-1], return_lse=True, impl="triton")
    assert out.shape == (0, dv or 16)
    assert lse.shape == (0,)
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), leaves):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(dtype: torch.dtype, scheme: str) -> None:
    from anomem.testing import gradients

    inputs = memory(97, 35, 24, 16, dtype)
    for first, second in zip(gradients(kernel(), inputs), gradients(kernel(), inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_bad_row_stays_alone(bad: float, normalize: str, scheme: str) -> None:
    query, keys, _ = memory(40, 35, 16)
    broken = query.clone()
    broken[3, 5] = bad
    others = torch.arange(40) != 3
    leaf = broken.requires_grad_()
    out, lse = kernel(normalize=normalize)(leaf, keys)
    exact_out, exact_lse = reference(normalize=normalize)(broken.detach(), keys)
    assert torch.equal(out.isfinite(), exact_out.isfinite())
    assert torch.equal(lse.isfinite(), exact_lse.isfinite())
    assert not out[3].isfinite().any()
    clean = kernel(normalize=normalize)(query, keys)
    assert torch.equal(out[others], clean[0][others])
    assert torch.equal(lse[others], clean[1][others])
    gradient = torch.autograd.grad(out.sum() + lse.sum(), leaf)[0]
    assert gradient[others].isfinite().all()
    assert gradient[3].isnan().any()


def test_a_zero_row_has_no_length(scheme: str) -> None:
    query, keys, _ = memory(17, 35, 24)
    query[2] = 0
    keys[4] = 0
    compare(kernel(normalize="l2"), reference(normalize="l2"), [query, keys])


def test_a_large_beta_reads_the_nearest_prototype(scheme: str) -> None:
    query, keys, values = memory(40, 35, 16, 8)
    out, _ = kernel(beta=1e6, normalize="l2")(query, keys, values)
    unit = torch.nn.functional.normalize
    nearest = (unit(query) @ unit(keys).mT).argmax(dim=1)
    assert torch.equal(out, values[nearest])


def test_a_query_does_not_see_its_batch_mates(scheme: str) -> None:
    query, keys, _ = memory(70, 35, 24)
    whole = kernel()(query, keys)
    order = torch.randperm(70)
    for mine, theirs in zip(kernel()(query[order], keys), whole, strict=True):
        torch.testing.assert_close(mine, theirs[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "dv"), [(torch.float32, None), (torch.bfloat16, 24)])
def test_operators_keep_their_schemas(dtype: torch.dtype, dv: int | None) -> None:
    from anomem.ops import retrieve  # noqa: F401  registers the operators

    query, keys, values = memory(17, 5, 16, dv, dtype)
    beta = torch.tensor(0.5)
    operators = torch.ops.anomem
    checks = ("test_schema", "test_faketensor")
    forward = (query, keys, values, beta, 1.0, 1)
    torch.library.opcheck(operators.triton_retrieve_fwd.default, forward, test_utils=checks)
    out, lse = operators.triton_retrieve_fwd(*forward)
    torch.library.opcheck(
        operators.triton_retrieve_bwd.default,
        (out, lse, query, keys, values, beta, 1.0, 1, out, lse),
        test_utils=checks,
    )


def test_compiles_into_one_graph() -> None:
    query, keys, _ = memory(17, 5, 16)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        out, lse = AF.hopfield_retrieve(q, k, beta=0.5, return_lse=True, impl="triton")
        return out.square().sum() + lse.sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (query, keys)]
        torch._dynamo.mark_dynamic(leaves[0], 0)
        value = run(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_double_backward_comes_from_the_reference() -> None:
    query, keys, _ = memory(5, 7, 16)

    def penalty(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor) -> Tensor:
            slope = torch.autograd.grad(function(q, k)[0].square().sum(), q, create_graph=True)[0]
            return slope.square().sum()

        return run

    compare(penalty(kernel(beta=0.5)), penalty(reference(beta=0.5)), [query, keys])


def test_vmap_folds_the_mapped_axis() -> None:
    query, keys = draw(3, 17, 16, seed=1), draw(5, 16, seed=2)
    mapped = torch.func.vmap(lambda q: AF.hopfield_retrieve(q, keys, impl="triton"))(query)
    torch.testing.assert_close(mapped, AF.hopfield_retrieve(query, keys, impl="triton"))


def test_rows_too_long_or_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ArgumentError, match="up to 2048, not 2049"):
        AF.hopfield_retrieve(torch.zeros(1, 2049), torch.zeros(1, 2049), impl="triton")
    with pytest.raises(ArgumentError, match="not float64"):
        AF.hopfield_retrieve(torch.zeros(1, 4).double(), torch.zeros(1, 4).double(), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("m", "d"), [(1, 2048), (16, 512), (512, 256), (16384, 16)])
def test_a_chunk_of_queries_is_small_whatever_the_memory(
    m: int, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its scores nor its normalised rows and their gradients grow with N."""
    from anomem.kernels import retrieve_chunked

    monkeypatch.undo()
    count = 2**24
    parts = list(retrieve_chunked.chunks(count, m, d, dtype))
    assert parts[0].start == 0
    assert parts[-1].stop == count
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    longest = max(part.stop - part.start for part in parts)
    assert longest % 128 == 0
    assert longest * m * (8 if dtype == torch.float32 else 12) <= retrieve_chunked.SCRATCH_BYTES
    assert longest * d * (4 + dtype.itemsize) <= retrieve_chunked.ROW_BYTES
