"""Stand-ins for other GPUs: ANOMEM_STAND_IN_CAPABILITY names theirs. test_stand_in.py runs these cases for each."""

from __future__ import annotations

import os

import pytest
import torch

from anomem import backends, obstacles, rules
from tests.stand_in.calls import TRITON, Call
from tests.stand_in.recording import of, recorded

CAPABILITY = int(os.environ["ANOMEM_STAND_IN_CAPABILITY"])
OLD = CAPABILITY < 80


def test_the_stand_in_has_this_capability() -> None:
    assert torch.cuda.get_device_capability() == divmod(CAPABILITY, 10)


@pytest.mark.skipif(OLD, reason="refused")
@pytest.mark.parametrize("name", TRITON)
def test_kernels_are_compiled_and_launched(name: str) -> None:
    """Their shared memory is within the limit of the device, which refuses more."""
    call = Call(*TRITON[name], torch.bfloat16)
    with recorded() as entries:
        call()
    assert of(entries, "launch")
    assert not of(entries, "fault")


@pytest.mark.skipif(not OLD, reason="supported")
@pytest.mark.parametrize("name", TRITON)
def test_an_old_gpu_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match="compute capability"):
        Call(*TRITON[name], torch.bfloat16)
    reason = obstacles.obstacle("gather", "native", "cuda", torch.float32, 64) or ""
    assert "need compute capability 8.0 or later" in reason
    assert backends.explain(rules.Problem("retrieve", "cuda", torch.bfloat16, 64, 2**20, 2**14))[0] == "reference"
