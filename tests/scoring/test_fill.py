"""Filling: the three choices against their definitions, deterministic, without a matrix of all distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem.errors import ArgumentError
from anomem.scoring import fill
from anomem.scoring.fill import FeatureRows, fill_prototypes, kmeans, nearest_in_blocks, prototype_count

METHODS = ("random", "coreset", "kmeans")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides(method: fill.Fill) -> None:
    rows = normal(500, 6)
    first, again, other = (fill_prototypes(rows, 20, method, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (20, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", METHODS)
def test_global_generator_is_left_alone(method: fill.Fill) -> None:
    before = torch.get_rng_state()
    fill_prototypes(normal(50, 3), 4, method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["random", "coreset"])
def test_rows_are_taken_once(method: fill.Fill) -> None:
    rows = torch.arange(12.0)[:, None].expand(12, 2)
    chosen = fill_prototypes(rows, 12, method)
    assert torch.equal(chosen.sort(dim=0).values, rows)


def test_coreset_takes_equal_rows_last() -> None:
    rows = torch.cat([torch.zeros(5, 2), torch.eye(2)])
    chosen = AF.k_center(rows, 7, first=0)
    assert sorted(chosen.tolist()) == list(range(7))
    assert set(chosen[1:3].tolist()) == {5, 6}, "what differs comes first"


@pytest.mark.parametrize("block", [1, 7 * 40, 10**6])
def test_nearest_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "BLOCK_ELEMENTS", block)
    rows, prototypes = normal(131, 5), normal(40, 5, seed=1)
    distance, index = nearest_in_blocks(rows, prototypes)
    expected = torch.cdist(rows.double(), prototypes.double()).square().min(dim=1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(distance.double(), expected.values, rtol=1e-4, atol=1e-5)


def test_coreset_by_definition() -> None:
    rows = normal(60, 4).double()
    chosen = AF.k_center(rows, 15, first=7).tolist()
    distances = torch.cdist(rows, rows)
    assert chosen[0] == 7
    for i in range(1, 15):
        assert chosen[i] == int(distances[:, chosen[:i]].amin(dim=1).argmax())


def test_kmeans_against_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    rows, start = normal(400, 5), normal(400, 5)[:12]
    expected = cluster.KMeans(12, init=start.numpy(), n_init=1, max_iter=200, tol=0, algorithm="lloyd").fit(
        rows.numpy()
    )
    found = kmeans(rows, start, 200)
    torch.testing.assert_close(found, torch.from_numpy(expected.cluster_centers_), rtol=1e-4, atol=1e-4)


def test_banks_of_several_seeds() -> None:
    """Each as with its own seed alone; k-means stops for each on its own."""
    rows = normal(300, 5)
    for method in METHODS:
        banks = fill_prototypes(rows, 8, method, seed=[3, 1, 4], iterations=60)  # type: ignore[arg-type]
        assert banks.shape == (3, 8, 5)
        for bank, seed in zip(banks, (3, 1, 4), strict=True):
            alone = fill_prototypes(rows, 8, method, seed=seed, iterations=60)  # type: ignore[arg-type]
            assert torch.equal(bank, alone)
    with pytest.raises(ArgumentError, match="`seed`"):
        fill_prototypes(rows, 8, seed=[])


def test_kmeans_lowers_the_distance_each_time() -> None:
    rows = normal(600, 6)
    losses = [float(nearest_in_blocks(rows, kmeans(rows, rows[:30], n)).distance.mean()) for n in (0, 1, 2, 5, 20)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_kmeans_refills_empty_centres() -> None:
    rows = torch.cat([normal(50, 2) * 0.01, torch.tensor([[10.0, 0.0], [0.0, 10.0]])])
    start = torch.cat([rows[:1], torch.full((2, 2), -1e4)])
    centres = kmeans(rows, start, 10)
    assert {tuple(c.round().tolist()) for c in centres} == {(0.0, 0.0), (10.0, 0.0), (0.0, 10.0)}


def test_kmeans_of_identical_rows() -> None:
    centres = kmeans(torch.ones(9, 3), torch.ones(4, 3), 5)
    assert torch.equal(centres, torch.ones(4, 3))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a fill is a block, not [N, M]."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(fill, "BLOCK_ELEMENTS", 2**19)
    rows = normal(6000, 4)
    for method in METHODS:
        with Watch():
            fill_prototypes(rows, 512, method, iterations=2)  # type: ignore[arg-type]
    assert largest <= max(fill.BLOCK_ELEMENTS, rows.numel())
    assert largest < 6000 * 512 / 4


@pytest.mark.parametrize(
    ("wanted", "rows", "count"), [(64, 1000, 64), (64, 10, 10), (0.1, 1000, 100), (0.001, 10, 1), (1, 5, 1)]
)
def test_counts_and_ratios(wanted: float, rows: int, count: int) -> None:
    assert prototype_count(wanted, rows) == count


@pytest.mark.parametrize("wanted", [0, -3, 0.0, 1.0, 1.5, True, math.nan])
def test_wrong_counts(wanted: float) -> None:
    with pytest.raises(ArgumentError, match=r"prototypes.*integer ≥ 1, or a ratio"):
        prototype_count(wanted, 100)


def test_wrong_arguments() -> None:
    rows = normal(10, 3)
    with pytest.raises(ArgumentError, match=r"prototypes.*at most 10"):
        fill_prototypes(rows, 11)
    with pytest.raises(ArgumentError, match=r"fill.*'kmeans'"):
        fill_prototypes(rows, 2, "medoids")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"rows.*finite"):
        fill_prototypes(torch.full((5, 2), math.nan), 2)
    with pytest.raises(ArgumentError, match="at least one normal image"):
        FeatureRows().rows()


def test_all_rows_are_held_where_there_is_room() -> None:
    held, rows = FeatureRows(100), normal(90, 3)
    for part in rows.split(25):
        held.add(part)
    assert torch.equal(held.rows(), rows)


def test_every_row_is_as_likely_to_be_held() -> None:
    counts = torch.zeros(60)
    for seed in range(300):
        held = FeatureRows(20, seed)
        for part in torch.arange(60.0)[:, None].split(7):
            held.add(part)
        rows = held.rows()[:, 0].long()
        assert len(rows.unique()) == 20
        counts[rows] += 1
    expected, spread = 300 / 3, math.sqrt(300 * (1 / 3) * (2 / 3))
    assert float((counts - expected).abs().max()) < 4.5 * spread
    assert counts[:20].mean() == pytest.approx(expected, abs=4 * spread / math.sqrt(20))
