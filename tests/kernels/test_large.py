"""Sizes at the end of the range: matrices of 2³¹ elements and more, batches of 65536 pairs.

A program sees where its rows lie, and how many there are, by arithmetic on their numbers. Here the interpreter runs the
first and the last programs of each grid at the true sizes, with the arithmetic of the hardware: 32 bits wrap around.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from anomem import reference as R
from anomem.testing import assert_within_budget, draw

Ends = Callable[..., AbstractContextManager[list[str]]]
TAIL = 40
PROGRAMS = TAIL // 8  # of the kernel with the smallest blocks, of 8 rows
pytestmark = pytest.mark.xdist_group("large")


@pytest.fixture(autouse=True)
def unwritten_memory_stays_unmade() -> Iterator[None]:
    """Filling what is not written with NaN, as the other tests do, would make every page of it."""
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30:
        pytest.skip("Linux promises one allocation no more than the memory it has, here less than 12 GiB")
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def promised(*shape: int) -> Tensor:
    """Zeros of bfloat16; pages come into being where they are written, which torch.zeros does everywhere."""
    return torch.from_numpy(numpy.zeros(shape, dtype=numpy.uint16)).view(torch.bfloat16)


def tiles_of(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    from anomem.kernels import tile_table

    monkeypatch.setattr(tile_table, "INTERPRETED", tile_table.Tile(rows, columns, warps=4, stages=1, shared=0))


def memory_of(prototypes: Tensor, normalize: int) -> Any:
    from anomem.kernels import rows
    from anomem.kernels.primitives import Memory

    return Memory(rows.normalized(prototypes, normalize), None, None, 0.5, normalize)


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize(("d", "kernel"), [(64, "retrieve_flash"), (256, "retrieve_flash"), (512, "retrieve_resident")])
def test_retrieval_of_2_31_numbers(d: int, kernel: str, normalize: int, ends_of_grids: Ends) -> None:
    """The last queries get what they get alone, the first what the first do."""
    from anomem.kernels import retrieve

    count = 2**31 // d + TAIL
    query, prototypes = promised(count, d), draw(17, d, dtype=torch.bfloat16)
    ends = draw(2 * TAIL, d, dtype=torch.bfloat16, seed=1)
    query[:TAIL], query[-TAIL:] = ends.split(TAIL)
    with ends_of_grids(PROGRAMS) as cut:
        out, lse, _ = retrieve.forward(query, prototypes, None, None, 0.5, normalize)
    assert {"retrieve_flash": "retrieve_flash_forward_kernel", "retrieve_resident": "retrieve_resident_kernel"}[
        kernel
    ] in cut
    assert retrieve.flash_entries(("retrieve_flash_forward",), query, None) is None or kernel == "retrieve_flash"
    expected, expected_lse, _ = retrieve.forward(ends, prototypes, None, None, 0.5, normalize)
    assert torch.equal(torch.cat([out[:TAIL], out[-TAIL:]]), expected)
    assert torch.equal(torch.cat([lse[:TAIL], lse[-TAIL:]]), expected_lse)


def test_queries_that_lie_2_31_apart() -> None:
    """A row stride that, times a row's number, does not fit 32 bits."""
    from anomem.kernels import retrieve

    storage, ends = promised(2**31 + 2**27), draw(34, 64, dtype=torch.bfloat16)
    query = storage.as_strided((34, 64), (2**26, 1))
    query.copy_(ends)
    for prototypes in (draw(17, 64, dtype=torch.bfloat16), draw(300, 64, dtype=torch.bfloat16)):
        for actual, expected in zip(
            *(retrieve.forward(x, prototypes, None, None, 0.5, 1) for x in (query, ends)), strict=True
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("normalize", [0, 1])
def test_gradients_of_2_31_numbers(normalize: int, ends_of_grids: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first and last queries, and the last partial sum over the queries, which has one tile of them each."""
    from anomem.kernels import retrieve, retrieve_flash

    d = 64
    count = 2**31 // d + TAIL
    memory = memory_of(draw(33, d, dtype=torch.bfloat16), normalize)  # whose partial sums are 2³¹ numbers as well
    tiles_of(monkeypatch, 32, 32)
    monkeypatch.setattr(retrieve_flash, "multiprocessors", lambda _: count)
    query, dout = promised(count, d), promised(count, d)
    queries, slopes = (draw(2 * TAIL, d, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    query[:TAIL], query[-TAIL:] = queries.split(TAIL)
    dout[:TAIL], dout[-TAIL:] = slopes.split(TAIL)

    def gradients(query: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        entries = retrieve.flash_entries(
            ("retrieve_flash_query_gradient", "retrieve_flash_prototype_sums"), query, None
        )
        assert entries is not None
        out, _, normaliser = retrieve_flash.forward(query, memory, entries[0])
        dquery, key_sums, _, _ = retrieve_flash.backward(dout, None, query, memory, out, normaliser, entries)
        return dquery, key_sums

    with ends_of_grids(PROGRAMS) as cut:
        dquery, key_sums = gradients(query, dout)
    flash = {f"retrieve_flash_{name}_kernel" for name in ("forward", "query_gradient", "prototype_sums")}
    assert flash | {"row_constant_kernel"} <= set(cut)
    expected, _ = gradients(queries, slopes)
    assert torch.equal(torch.cat([dquery[:TAIL], dquery[-TAIL:]]), expected)
    last = count % 32
    assert key_sums.shape[0] == count // 32 + 1
    _, tail_sums = gradients(queries[-last:].clone(), slopes[-last:].clone())
    assert tail_sums.shape[0] == 1
    assert torch.equal(key_sums[-1], tail_sums[0])
    _, head_sums = gradients(queries[:32].clone(), slopes[:32].clone())
    assert torch.equal(key_sums[0], head_sums[0])


class Copies:
    """2B rows that are copies of few, so that sums over all of them are sums over few; float64."""

    def __init__(self, batch: int, features: int, distinct: int, dtype: torch.dtype) -> None:
        self.batch, self.distinct = batch, distinct
        self.few = [draw(distinct, features, dtype=dtype, seed=seed) for seed in (1, 2)]
        self.views = [x.repeat(batch // distinct, 1)[None] for x in self.few]
        self.unit = torch.cat([torch.nn.functional.normalize(x.double(), dim=1) for x in self.few])

    def row(self, index: Tensor) -> Tensor:
        """Which of the distinct rows these are."""
        return index % self.distinct + (index >= self.batch) * self.distinct

    def lse(self, tau: float) -> Tensor:
        """[2B] of Σ over all rows but the row itself."""
        logits = self.unit @ self.unit.mT / tau
        copies = torch.full_like(logits, self.batch / self.distinct) - torch.eye(len(logits), dtype=torch.float64)
        return torch.logsumexp(logits + copies.log(), dim=1)[self.row(torch.arange(2 * self.batch))]


@pytest.mark.parametrize(("tau", "dtype"), [(0.2, torch.float16), (0.02, torch.bfloat16)], ids=str)
def test_nt_xent_of_65536_pairs(
    tau: float, dtype: torch.dtype, ends_of_grids: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients of the first and last rows of 131072, each against all others."""
    from anomem.kernels import contrast

    batch, features = 65536, 16
    rows = Copies(batch, features, 256, dtype)
    tiles_of(monkeypatch, 32, 16384)
    lse = rows.lse(tau)
    ends = torch.cat([torch.arange(32), torch.arange(2 * batch - 32, 2 * batch)])
    upstream = draw(1, 2 * batch, seed=3)
    with ends_of_grids(1, whole=("contrast_scaled_rows_kernel",)) as cut:
        loss, mine, scaled, inverse = contrast.nt_xent_forward(*rows.views, None, tau)
        cosines = torch.cosine_similarity(*(view[0].double() for view in rows.views), dim=-1)  # [B]
        all_losses = lse - torch.cat([cosines, cosines]) / tau  # [2B]
        totals = [x.float()[None] for x in (all_losses, lse)]
        dz, dz_pair, _ = contrast.nt_xent_backward(upstream, *totals, scaled, inverse, None, tau, features)
    assert cut == ["contrast_forward_kernel", "contrast_backward_kernel"]

    def losses_and_slopes(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Of the ends; plain, in row blocks."""
        raw = torch.cat([x[0] for x in rows.views]).to(dtype)
        unit = R.l2_normalize(raw)
        logits = (unit[ends] @ unit.mT) / tau
        logits[torch.arange(64), ends] = -torch.inf
        target = (ends + batch) % (2 * batch)
        row_lse = torch.logsumexp(logits, dim=1)
        g, all_lse = upstream[0].to(dtype), lse.to(dtype)
        weights = torch.exp(logits - all_lse[ends, None]) * g[ends, None] + torch.exp(logits - all_lse) * g
        weights[torch.arange(64), target] -= g[ends] + g[target]
        du = weights @ unit / tau
        u = unit[ends]
        dx = (du - u * (u * du).sum(1, keepdim=True)) / torch.linalg.vector_norm(raw[ends], dim=1, keepdim=True)
        return row_lse - logits[torch.arange(64), target], row_lse, dx

    plain, exact = losses_and_slopes(torch.float32), losses_and_slopes(torch.float64)
    torch.testing.assert_close(exact[1], lse[ends])
    actual = (loss[0, ends], mine[0, ends], torch.cat([dz[0, :32], dz_pair[0, -32:]]).float())
    for name, a, p, e in zip(("loss", "lse", "gradient"), actual, plain, exact, strict=True):
        low = dtype if name == "gradient" else torch.float32
        assert_within_budget(a.to(low), p.to(low), e, name)


def test_nt_xent_of_2_31_numbers(ends_of_grids: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """258 groups: the last rows of the last group get what they get in a group of their own."""
    from anomem.kernels.contrast_backward import JOINED, gradient
    from anomem.kernels.contrast_forward import losses
    from anomem.kernels.contrast_rows import Inputs, plan, scaled_rows

    batch, features = 32768, 128
    tiles_of(monkeypatch, 32, 8192)
    groups = 2**31 // (2 * batch * features) + 2
    z, z_pair = promised(groups, batch, features), promised(groups, batch, features)
    z_pair[-1, -TAIL:] = draw(TAIL, features, dtype=torch.bfloat16)

    def last_rows(z: Tensor, z_pair: Tensor) -> list[Tensor]:
        """All other rows stay zero, as if no program had been left out."""
        scaled, dz, dz_pair = promised(len(z), 2 * batch, features), promised(*z.shape), promised(*z.shape)
        inverse, all_losses, all_lse, upstream = (torch.zeros(len(z), 2 * batch) for _ in range(4))
        with ends_of_grids(2) as cut:
            first, second = slice(batch), slice(batch, None)
            scaled_rows(z, scaled[:, first], inverse[:, first], z_pair, scaled[:, second], inverse[:, second])
            loss, lse = losses(scaled, scaled, inverse, inverse, None, None, None, 0.2)
            all_losses[-1, -TAIL:], all_lse[-1, -TAIL:] = loss[-1, -TAIL:], lse[-1, -TAIL:]
            upstream[-1, -TAIL:] = 1.0
            rows, cut_up = Inputs(scaled, inverse, (dz, dz_pair)), plan("contrast_backward", scaled)
            assert cut_up is not None
            gradient(JOINED, rows, rows, all_losses, all_lse, upstream, None, None, None, 0.2, False, cut_up)
        assert cut == ["contrast_scaled_rows_kernel", "contrast_forward_kernel", "contrast_backward_kernel"]
        return [x[-1, -TAIL:] for x in (loss, lse, scaled, inverse, dz_pair)]

    assert (groups - 1) * 2 * batch * features > 2**31
    for mine, expected in zip(last_rows(z, z_pair), last_rows(z[-1:], z_pair[-1:]), strict=True):
        assert bool(expected.any())
        assert torch.equal(mine, expected)
