"""The Triton kernels on a GPU: every scheme at a size that fills it, and what only a GPU can show.

`compute-sanitizer --tool memcheck python -m pytest -m gpu tests/kernels` runs them under NVIDIA's checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anomem import reference
from anomem.functional import hopfield_retrieve, info_nce, nt_xent
from anomem.testing import assert_within_budget, compare, draw, gradients

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, M, d, dv (0: tied). Flash for short rows, resident scores for long half-precision rows and small memories, chunks
# for the rest; whole tiles and tails.
RETRIEVALS = [(5000, 512, 64, 0), (4097, 100, 256, 0), (513, 70, 40, 24), (2048, 200, 512, 0), (1000, 2000, 1024, 0)]
CONTRASTS = [(16, 512, 128), (1, 3000, 100), (2, 300, 1024), (64, 1, 64)]


@pytest.fixture(scope="session")
def device() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on: select these tests with -m gpu")
    return "cuda"


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """TF32 products would not keep the budget of float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def memory(device: str, dtype: torch.dtype, n: int, m: int, d: int, dv: int) -> list[Tensor]:
    """query, prototypes and, if dv > 0, values."""
    sizes = [(n, d), (m, d), *([(m, dv)] if dv else [])]
    return [draw(*size, dtype=dtype, seed=seed).to(device) for seed, size in enumerate(sizes)]


def retrieval(query: Tensor, prototypes: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    found = reference.hopfield_retrieve(query, prototypes, values=values)
    return found.out, found.lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RETRIEVALS, ids=str)
def test_retrieval_is_within_budget(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    compare(
        lambda q, k, v=None: hopfield_retrieve(q, k, values=v, return_lse=True, impl="triton"),
        retrieval,
        memory(device, dtype, *shape),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.005, 0.07, 0.2])
@pytest.mark.parametrize("shape", CONTRASTS, ids=str)
def test_nt_xent_is_within_budget(device: str, shape: tuple[int, int, int], tau: float, dtype: torch.dtype) -> None:
    compare(
        lambda a, b: nt_xent(a, b, temperature=tau, reduction="none", impl="triton"),
        lambda a, b: reference.nt_xent_rows(a, b, tau),
        [draw(*shape, dtype=dtype, seed=seed).to(device) for seed in (1, 2)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce_is_within_budget(device: str, dtype: torch.dtype) -> None:
    positive = torch.randint(500, (300,), generator=torch.Generator().manual_seed(0)).to(device)
    compare(
        lambda r, c: info_nce(r, c, positive, temperature=0.07, reduction="none", impl="triton"),
        lambda r, c: reference.info_nce_rows(r, c, positive, None, 0.07),
        [draw(2, rows, 72, dtype=dtype, seed=rows).to(device) for rows in (300, 500)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_repeat(device: str, dtype: torch.dtype) -> None:
    """Sums over queries and over tiles have a fixed order."""
    views = [draw(8, 256, 128, dtype=dtype, seed=seed).to(device) for seed in (1, 2)]
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (lambda a, b: nt_xent(a, b, reduction="none", impl="triton"), views),
        *(
            (lambda *x: hopfield_retrieve(*x[:2], impl="triton"), memory(device, dtype, *shape)[:2])
            for shape in RETRIEVALS
        ),
    ]
    for function, inputs in calls:
        first, second = (gradients(function, inputs) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_tf32_is_used_where_torch_allows_it(device: str) -> None:
    query, prototypes = memory(device, torch.float32, 2048, 512, 64, 0)
    exact = hopfield_retrieve(query.double(), prototypes.double(), impl="reference")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    loose = hopfield_retrieve(query, prototypes, impl="triton")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    tight = hopfield_retrieve(query, prototypes, impl="triton")
    torch.testing.assert_close(loose.double(), exact, atol=2e-2, rtol=0)
    assert float((tight - exact).abs().max()) < float((loose - exact).abs().max())


def test_offsets_beyond_32_bits(device: str) -> None:
    """N·d ≥ 2³¹: the last rows and their gradients are those of a small call."""
    n, d = 2**25 + 8, 64
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of GPU memory")
    tail, prototypes = memory(device, torch.bfloat16, 8, 16, d, 0)
    query = torch.zeros(n, d, dtype=torch.bfloat16, device=device)
    query[-8:] = tail
    slopes = draw(8, d, dtype=torch.bfloat16, seed=2).to(device)

    def last_rows(query: Tensor) -> tuple[Tensor, Tensor]:
        out = hopfield_retrieve(query.requires_grad_(), prototypes, impl="triton")
        upstream = torch.zeros_like(out)
        upstream[-8:] = slopes
        return out.detach()[-8:], torch.autograd.grad(out, query, upstream)[0][-8:]

    for actual, expected in zip(last_rows(query), last_rows(tail), strict=True):
        assert torch.equal(actual, expected)


def test_65536_pairs(device: str) -> None:
    """2B = 131072 rows; those of the first pairs are held to float64."""
    z, z_pair = (draw(65536, 64, dtype=torch.bfloat16, seed=seed).to(device) for seed in (1, 2))
    rows = nt_xent(z, z_pair, temperature=0.07, reduction="none", impl="triton")

    def first_rows(dtype: torch.dtype) -> Tensor:
        unit = torch.nn.functional.normalize(torch.cat([z, z_pair]).to(dtype), dim=1)
        logits = unit[:64] @ unit.mT / 0.07
        pairs = torch.arange(64, device=device)
        logits[pairs, pairs] = -torch.inf
        return torch.logsumexp(logits, dim=1) - logits[pairs, 65536 + pairs]

    assert_within_budget(rows.flatten()[:64], first_rows(torch.float32), first_rows(torch.float64))


def test_compiled_whole_for_any_number_of_rows(device: str) -> None:
    prototypes = draw(64, 128, seed=1).to(device)
    compiled = torch.compile(
        lambda q: hopfield_retrieve(q, prototypes, impl="triton") * 2.0, fullgraph=True, dynamic=True
    )
    for n in (100, 4096, 777):
        query = draw(n, 128, seed=n).to(device)
        torch.testing.assert_close(compiled(query), hopfield_retrieve(query, prototypes, impl="triton") * 2.0)


def test_tiles_are_measured_once_and_read_again(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.kernels import tile_search

    def retrieve(query: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
        return hopfield_retrieve(query, prototypes, return_lse=True, impl="triton")

    inputs, path = memory(device, torch.bfloat16, 5000, 512, 64, 0), tmp_path / "tiles.json"
    with tile_search.using(tile_search.Choice(path, search=True)) as choice:
        compare(retrieve, retrieval, inputs)
    kernels = ["retrieve_flash_forward", "retrieve_flash_prototype_sums", "retrieve_flash_query_gradient"]
    assert [search.site.entry[0] for search in choice.searches] == kernels
    for search in choice.searches:
        assert search.best is not None
        assert search.best.registers > 0
        assert search.best.tile.shared > 0
    monkeypatch.setattr(tile_search, "measure", None)
    with tile_search.using(tile_search.Choice(path, search=True)) as again:
        gradients(retrieve, inputs)
    assert again.searches == []


def test_a_captured_launch_searches_nothing(device: str) -> None:
    from anomem.kernels import tile_search

    query, prototypes = memory(device, torch.bfloat16, 4096, 512, 64, 0)
    plain = hopfield_retrieve(query, prototypes, impl="triton")  # compiles the table's tile, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with tile_search.using(tile_search.Choice(None, search=True)) as choice, torch.cuda.graph(graph):
        captured = hopfield_retrieve(query, prototypes, impl="triton")
    graph.replay()
    assert choice.searches == []
    assert torch.equal(captured, plain)
