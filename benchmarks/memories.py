"""Filling and reading memories beside scikit-learn, faiss and plain PyTorch. `python -m benchmarks.memories`.

CPU time of one thread, so that other processes of the machine matter little. Implementations take turns. Each result is
compared with float64 before it is timed, and a wrong one is not timed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, scikit-learn and faiss start their threads

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from torch import Tensor

from anomem import functional as AF
from anomem.scoring import fill
from anomem.testing import draw
from benchmarks.harness import rows
from benchmarks.harness.console import say
from benchmarks.harness.measure import Timed, peak_bytes, take_turns

ROWS = "memories.jsonl"
What = Literal["nearest", "read", "read all", "kmeans", "coreset"]
QUERIES = 16 * 256
PROTOTYPES = (1024, 4096, 16384)
FEATURES = (40, 112, 192, 512)
NEIGHBOURS = 8
"""k of a read."""
ITERATIONS = 20
"""Of k-means."""
CENTRES = 100
"""What is linear in the number of centres is timed for so many and scaled up."""
EXCHANGED = 1e-3
"""Part of a result's rows that may differ."""
LIBRARIES = {"faiss": "faiss-cpu", "scikit-learn": "scikit-learn"}
Call = Callable[[], tuple[Tensor, ...]]


@dataclass
class MemoryRow:
    """One implementation of one case."""

    what: str
    rows: int
    prototypes: int
    features: int
    k: int
    implementation: str
    milliseconds: dict[str, float]
    """p20, p50 and p80 of one call, CPU time."""
    repeats: int
    scaled: float
    """Factor by which the time of a shorter call was multiplied; 1 for the call itself."""
    peak_bytes: int | None
    """Of torch's allocations during a call; what numpy, faiss and the native library hold themselves is not seen."""
    library: str
    """Version of the rival."""
    commit: str
    dirty: bool
    torch: str
    processor: str
    threads: int

    @property
    def key(self) -> tuple[Any, ...]:
        """The last row of an implementation of a case counts."""
        return self.what, self.rows, self.prototypes, self.features, self.k, self.implementation


@dataclass(frozen=True)
class Options:
    """What is measured."""

    what: tuple[What, ...] = get_args(What)
    """Cases."""
    results: Path = rows.RESULTS
    """Folder of memories.jsonl."""
    features: tuple[int, ...] = FEATURES
    """d of reads."""
    prototypes: tuple[int, ...] = PROTOTYPES
    """M of reads."""
    small: bool = False
    """Sizes for trying the command; nothing is written."""


@dataclass
class Contestant(Timed):
    """An implementation of a case."""

    name: str
    scaled: float = 1.0
    peak: int | None = None


def main(options: Options) -> None:
    """Measure and write rows."""
    torch.set_num_threads(1)
    for what in options.what:
        for sizes in cases(what, options):
            n, m, d, k = sizes
            calls = CASES[what](*sizes)
            contestants = prepared(calls, what, sizes)
            seconds = 0.2 if options.small else 0.4
            take_turns(contestants, lambda c, s=seconds: sum(c.seconds) > s and len(c.seconds) >= 3, most=30)
            measured = [row_of(what, sizes, one) for one in contestants]
            if not options.small:
                rows.append(options.results / ROWS, *measured)
            times = ", ".join(f"{row.implementation} {row.milliseconds['p50']:.4g} ms" for row in measured)
            say(f"{what} N={n} M={m} d={d} k={k}: {times}")


def cases(what: What, options: Options) -> Iterator[tuple[int, int, int, int]]:
    """(N, M, d, k)."""
    if what == "kmeans":
        yield (2000, 64, 24, 1) if options.small else (20_000, 1024, 112, 1)
    elif what == "coreset":
        yield from [(2000, 64, 24, 1)] if options.small else [(20_000, 1024, 112, 1), (160_000, 1600, 512, 1)]
    else:
        for d in options.features:
            for m in options.prototypes:
                k = {"nearest": 1, "read": NEIGHBOURS, "read all": 0}[what]
                yield (64 if options.small else QUERIES), (128 if options.small else m), d, k


def prepared(calls: Mapping[str, tuple[Call, float]], what: str, sizes: tuple[int, ...]) -> list[Contestant]:
    """Checks each result with that of "exact" and times what is right."""
    exact = calls["exact"][0]()
    found = []
    for name, (call, scaled) in calls.items():
        if name == "exact":
            continue
        fault = wrong(call(), exact, 0.02 if what == "kmeans" else 1e-4)
        if fault:
            raise SystemExit(f"{what} {sizes}: {name} gives wrong numbers: {fault}")

        def once(call: Call = call, scaled: float = scaled) -> float:
            begin = time.process_time()
            call()
            return (time.process_time() - begin) * scaled

        peak = peak_bytes(call, "cpu") if what in ("nearest", "read", "read all") else None
        found.append(Contestant(once=once, name=name, scaled=scaled, peak=peak))
    return found


def wrong(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], limit: float) -> str | None:
    """What differs from the exact result, by more than a part of its largest number, or None.

    1e-4 is the rounding of |x|² − 2 x·m + |m|² in float32; k-means amplifies rounding from one iteration to the next.
    """
    for i, (one, truth) in enumerate(zip(found, exact, strict=True)):
        if one.shape != truth.shape:
            return f"result {i} has shape {tuple(one.shape)}"
        unit = float(truth.abs().max())
        errors = (one.double() - truth).abs().flatten(1 if truth.dim() > 1 else 0)
        errors = errors.amax(dim=1) if truth.dim() > 1 else errors  # of each row
        # Rounding may exchange the last of the k nearest with the next one.
        differ = float((~(errors <= limit * unit)).double().mean())
        if differ > EXCHANGED:
            return f"result {i} errs in {differ:.2%} of its rows, by up to {float(errors.max()):.3g} of {unit:.3g}"
    return None


def row_of(what: str, sizes: tuple[int, int, int, int], one: Contestant) -> MemoryRow:
    """The row of a contestant that was timed."""
    about = rows.about("cpu")
    package = LIBRARIES.get(one.name)
    return MemoryRow(
        what, *sizes, one.name,
        {name: round(value, 4) for name, value in one.milliseconds().items()}, len(one.seconds), one.scaled, one.peak,
        importlib.metadata.version(package) if package else about["torch"],
        about["commit"], about["dirty"], about["torch"], about["device_name"], about["threads"],
    )  # fmt: skip


def nearest_calls(n: int, m: int, d: int, k: int) -> dict[str, tuple[Call, float]]:
    """Squared distance of the nearest prototype: PatchCore's score of a position."""
    import faiss

    x, prototypes = draw(n, d), draw(m, d, seed=1)
    transposed, half = prototypes.T.contiguous(), prototypes.square().sum(dim=1) / -2
    index = faiss.IndexFlatL2(d)
    index.add(prototypes.numpy())

    def plain() -> tuple[Tensor, ...]:
        best = torch.addmm(half, x, transposed).max(dim=1).values
        return ((x.square().sum(dim=1) - 2 * best).clamp_min_(0),)

    return {
        "exact": (lambda: (torch.cdist(x.double(), prototypes.double()).square().amin(dim=1),), 1),
        "native": (lambda: (AF.nearest(x, prototypes, impl="native").distance,), 1),
        "cdist": (lambda: (torch.cdist(x, prototypes).min(dim=1).values.square(),), 1),
        "PyTorch": (plain, 1),
        "faiss": (lambda: (torch.from_numpy(index.search(x.numpy(), 1)[0][:, 0]),), 1),
    }


def read_calls(n: int, m: int, d: int, k: int) -> dict[str, tuple[Call, float]]:
    """Mean of the k nearest prototypes weighted by softmax(−|x − m|²/tau); of all prototypes for k = 0."""
    import faiss

    x, prototypes, tau = draw(n, d), draw(m, d, seed=1), d / 2
    transposed, squares = prototypes.T.contiguous(), prototypes.square().sum(dim=1)
    bias = squares / -tau
    options: dict[str, Any] = {"beta": 2 / tau, "bias": bias, "normalize": "none", "impl": "native"}
    native = partial(AF.read_memory, x, prototypes, top_k=k or None, **options)

    def weighted(distance: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        weights = (distance / -tau).softmax(dim=1)
        return (torch.bmm(weights[:, None], prototypes[index])[:, 0],)

    def exact() -> tuple[Tensor, ...]:
        distance = torch.cdist(x.double(), prototypes.double()).square()
        near, index = distance.topk(k or m, dim=1, largest=False)
        weights = torch.zeros_like(distance).scatter_(1, index, (near / -tau).softmax(dim=1))
        return (weights @ prototypes.double(),)

    def by_cdist() -> tuple[Tensor, ...]:
        near, index = torch.cdist(x, prototypes).topk(k, dim=1, largest=False)
        return weighted(near.square(), index)

    def plain() -> tuple[Tensor, ...]:
        scores = torch.addmm(bias, x, transposed, alpha=2 / tau)
        if k == 0:
            return (scores.softmax(dim=1) @ prototypes,)
        near, index = scores.topk(k, dim=1)
        return weighted(near * -tau, index)

    found: dict[str, tuple[Call, float]] = {
        "exact": (exact, 1),
        "native": (lambda: (native().out,), 1),
        "PyTorch": (plain, 1),
    }
    if k:
        index = faiss.IndexFlatL2(d)
        index.add(prototypes.numpy())

        def by_faiss() -> tuple[Tensor, ...]:
            near, places = index.search(x.numpy(), k)
            return weighted(torch.from_numpy(near), torch.from_numpy(places))

        found |= {"cdist": (by_cdist, 1), "faiss": (by_faiss, 1)}
    return found


def kmeans_calls(n: int, m: int, d: int, k: int) -> dict[str, tuple[Call, float]]:
    """Twenty iterations of Lloyd from the same rows; compared by the mean distance that they reach."""
    import faiss
    from sklearn.cluster import KMeans

    x = draw(300, d, seed=1)[torch.arange(n) % 300] + draw(n, d) * 0.7
    start = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:m]]

    def reached(centres: Tensor) -> tuple[Tensor, ...]:
        return (AF.nearest(x[:2000], centres).distance.mean()[None],)

    def by_faiss() -> Tensor:
        found = faiss.Kmeans(d, m, niter=ITERATIONS, max_points_per_centroid=n, min_points_per_centroid=1)
        found.train(x.numpy(), init_centroids=start.numpy())
        return torch.from_numpy(found.centroids)

    def by_sklearn() -> Tensor:
        found = KMeans(m, init=start.numpy(), n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
        return torch.from_numpy(found.fit(x.numpy()).cluster_centers_)

    def plain(rows: Tensor, centres: Tensor, iterations: int) -> Tensor:
        centres = centres.clone()
        for _ in range(iterations):
            half = centres.square().sum(dim=1) / -2
            label = torch.cat([torch.addmm(half, part, centres.T).argmax(dim=1) for part in rows.split(2**19 // m)])
            size = torch.bincount(label, minlength=m)
            sums = torch.zeros_like(centres).index_add_(0, label, rows)
            centres = torch.where((size > 0)[:, None], sums / size.clamp_min(1)[:, None], centres)
        return centres

    return {
        "exact": (lambda: tuple(v.double() for v in reached(plain(x, start, ITERATIONS))), 1),
        "native": (lambda: reached(fill.kmeans(x, start, ITERATIONS)), 1),
        "PyTorch": (lambda: reached(plain(x, start, ITERATIONS)), 1),
        "scikit-learn": (lambda: reached(by_sklearn()), 1),
        "faiss": (lambda: reached(by_faiss()), 1),
    }


def coreset_calls(n: int, m: int, d: int, k: int) -> dict[str, tuple[Call, float]]:
    """Greedy k-center; rivals compute the distances to one centre at a time, as PatchCore's code does."""
    import faiss
    import numpy
    from sklearn.metrics.pairwise import euclidean_distances

    x = draw(300, d, seed=1)[torch.arange(n) % 300] + draw(n, d) * 0.7
    array, length = x.numpy(), x.square().sum(dim=1)
    lengths = length.numpy()[None]
    few = min(m, CENTRES)

    def by_torch() -> tuple[Tensor, ...]:
        distance, chosen = torch.full((n,), torch.inf), torch.zeros(few, dtype=torch.int64)
        for i in range(few):
            if i:
                chosen[i] = distance.argmax()
            centre = x[chosen[i]]
            torch.minimum(distance, torch.addmv(length, x, centre, alpha=-2).add_(length[chosen[i]]), out=distance)
        return (chosen,)

    def by_numpy(distances: Callable[[int], Any]) -> tuple[Tensor, ...]:
        distance, chosen = numpy.full(n, numpy.inf, dtype=numpy.float32), numpy.zeros(few, dtype=numpy.int64)
        for i in range(few):
            if i:
                chosen[i] = distance.argmax()
            numpy.minimum(distance, distances(int(chosen[i])), out=distance)
        return (torch.from_numpy(chosen),)

    def by_sklearn(centre: int) -> Any:
        one = array[centre : centre + 1]
        return euclidean_distances(one, array, X_norm_squared=None, Y_norm_squared=lengths, squared=True)[0]

    def by_faiss(centre: int) -> Any:
        return faiss.pairwise_distances(array[centre : centre + 1], array)[0]

    def whole() -> tuple[Tensor, ...]:
        return (AF.k_center(x, m, impl="native")[:few],)

    return {
        "exact": (lambda: (AF.k_center(x, few, impl="native").double(),), 1),
        "native": (whole, 1),
        "PyTorch": (by_torch, m / few),
        "scikit-learn": (lambda: by_numpy(by_sklearn), m / few),
        "faiss": (lambda: by_numpy(by_faiss), m / few),
    }


CASES: dict[str, Callable[[int, int, int, int], dict[str, tuple[Call, float]]]] = {
    "nearest": nearest_calls,
    "read": read_calls,
    "read all": read_calls,
    "kmeans": kmeans_calls,
    "coreset": coreset_calls,
}


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.memories", description=__doc__))
