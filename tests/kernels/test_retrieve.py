"""How retrieval's Triton kernels divide their work; what they compute is held by tests/operators."""

from __future__ import annotations

import itertools

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "d"), [(1, 2048), (16, 512), (512, 256), (16384, 16)])
def test_a_chunk_of_queries_is_small_whatever_the_memory(m: int, d: int, dtype: torch.dtype) -> None:
    """Neither its scores nor its normalised rows and their gradients grow with N."""
    from anomem.kernels import primitives, retrieve_chunked

    count = 2**24
    parts = list(retrieve_chunked.chunks(count, m, d, dtype, torch.device("cpu")))
    assert parts[0].start == 0
    assert parts[-1].stop == count
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    longest = max(part.stop - part.start for part in parts)
    assert longest % 128 == 0
    assert longest * m * (8 if dtype == torch.float32 else 6) <= primitives.SCRATCH_BYTES
    assert longest * d * (4 + dtype.itemsize) <= retrieve_chunked.ROW_BYTES
