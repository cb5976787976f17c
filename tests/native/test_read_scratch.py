"""The C++ read and nearest prototypes hold no matrix [N, M]: peak memory of a process does not grow with N·M."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROOM = 24 << 20
"""Bytes that a call may add to the process beyond inputs and results; the matrix of the larger call has 1 GiB."""
PROGRAM = """
import resource, sys, torch
from anomem import functional as AF
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

CALLS = {
    "read": lambda x, m: AF.read_memory(x, m, top_k=8, nearest=True, impl="native"),
    "read of all": lambda x, m: AF.read_memory(x, m, top_k=None, nearest=True, impl="native"),
    "nearest": lambda x, m: AF.nearest(x, m, k=4, impl="native"),
}
call = CALLS[sys.argv[1]]
call(torch.randn(4096, 16), torch.randn(1024, 16))  # allocators and generated kernels
for n, count in ((8192, 2048), (32768, 8192)):
    x, prototypes = torch.randn(n, 16), torch.randn(count, 16)
    before = peak()
    result = call(x, prototypes)
    print(peak() - before)
"""


@pytest.mark.parametrize("what", ["read", "read of all", "nearest"])
def test_peak_memory_does_not_grow_with_scores(library: None, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert small < ROOM
    assert large < ROOM, f"{large >> 20} MiB for 268 million scores"
