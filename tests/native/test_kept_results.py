"""Large results of the native library: the process keeps their memory when they are gone (csrc/cpu/scratch.h)."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anomem.functional import hopfield_retrieve
from anomem.testing import draw

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
QUERIES, FEATURES = 8192, 64  # 2 MiB of float32


keeps = pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="under the sanitizer unused memory is freed")


def retrieve(seed: int = 0, queries: int = QUERIES) -> Tensor:
    return hopfield_retrieve(draw(queries, FEATURES, seed=seed), draw(40, FEATURES, seed=9), impl="native")


@keeps
def test_memory_is_used_again_once_its_tensor_is_gone(library: None) -> None:
    first = retrieve()
    address, expected = first.data_ptr(), first.clone()
    del first
    second = retrieve(1)
    assert second.data_ptr() == address
    assert not torch.equal(second, expected)


def test_memory_in_use_is_not_given_away(library: None) -> None:
    results = [retrieve(seed) for seed in range(4)]
    assert len({x.data_ptr() for x in results}) == len(results)
    for seed, result in enumerate(results):
        assert torch.equal(result, retrieve(seed))


def test_a_view_holds_the_memory(library: None) -> None:
    view = retrieve()[4000:, :7]
    expected = view.clone()
    for seed in range(1, 4):
        retrieve(seed)
    assert torch.equal(view, expected)


def test_a_result_is_a_tensor_like_others(library: None) -> None:
    result = retrieve()
    expected = result.clone()
    assert result.is_contiguous()
    assert result.untyped_storage().nbytes() == QUERIES * FEATURES * 4
    assert result.data_ptr() % 64 == 0
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    kept = [torch.load(file), copy.deepcopy(result), torch.from_dlpack(result), torch.from_numpy(result.numpy())]
    assert all(torch.equal(x, expected) for x in kept)
    result.share_memory_()
    assert result.is_shared()
    assert torch.equal(result.add_(1), expected + 1)
    with pytest.raises(RuntimeError, match="not resizable"):
        retrieve().resize_(QUERIES + 1, FEATURES)


def test_gradients_are_kept_by_whoever_holds_them(library: None) -> None:
    query = draw(QUERIES, FEATURES).requires_grad_()
    memory = draw(40, FEATURES, seed=9).requires_grad_()
    for _ in range(2):  # the second is added to the first
        hopfield_retrieve(query, memory, impl="native").square().sum().backward()
    assert query.grad is not None
    twice = query.grad.clone()
    query.grad = None
    hopfield_retrieve(query, memory, impl="native").square().sum().backward()
    assert torch.equal(twice, 2 * query.grad)


PEAK = f"""
import random, resource, sys
import torch
from anomem.functional import hopfield_retrieve
torch.set_num_threads(1)
memory = torch.randn(40, {FEATURES})
def retrieve(queries):
    hopfield_retrieve(torch.randn(queries, {FEATURES}), memory, impl="native")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for queries in (100, 9000):
    retrieve(queries)
before = resident()
for queries in range(100_000, 200_000, 10_000):  # 24 to 49 MiB of results each, 366 together
    retrieve(queries)
print(resident() - before)
source, live, most = random.Random(0), [], 0
for _ in range(200):  # any sizes, given back in any order
    queries = source.randrange(4_000, 160_000)
    while sum(map(len, live)) + queries > 400_000 or (live and source.random() < 0.4):
        live.pop(source.randrange(len(live)))
    live.append(hopfield_retrieve(torch.randn(queries, {FEATURES}), memory, impl="native"))
    most = max(most, sum(map(len, live)))
live.clear()
print(resident() - before - most * {FEATURES} * 4)
"""


@keeps
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_unused_memory_is_no_more_than_was_in_use_at_once(library: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    growing, mixed = map(int, done.stdout.split())
    assert growing < 110 * MIB
    assert mixed < 80 * MIB


SCARCE = f"""
import resource, torch
from anomem.functional import hopfield_retrieve
torch.set_num_threads(1)
memory = torch.randn(40, {FEATURES})
rows = 10 * {MIB} // ({FEATURES} * 4)
queries = torch.randn(14 * rows, {FEATURES})

def read(tenths):
    return hopfield_retrieve(queries[:tenths * rows], memory, impl="native")

read(10)  # 100 MiB, which are kept
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 60 * {MIB}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(len(read(14)) == 14 * rows)
held = [read(10)]
try:
    read(14)
except MemoryError as error:
    print(error)
"""


THREADS = f"""
import resource, torch
from anomem.functional import memory_diagnostics
torch.set_num_threads(2)
memory, queries = torch.randn(100_000, 16), torch.randn(400, 16)
memory_diagnostics(queries, memory[:200], impl="native")
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 40 * {MIB}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    memory_diagnostics(queries, memory, impl="native")
except MemoryError as error:
    print(str(error)[:23])
"""


@keeps
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("program", "said"),
    [(SCARCE, ["True", f"anomem: out of memory, for {14 * 10 * MIB} bytes"]), (THREADS, ["anomem: out of memory, "])],
    ids=["results", "scratch of threads"],
)
def test_unused_memory_is_given_back_before_a_call_fails(library: None, program: str, said: list[str]) -> None:
    """140 MiB where 60 are left beside the 100 that are kept; and an error that says how much was missing."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == said
