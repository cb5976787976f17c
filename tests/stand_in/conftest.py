"""What the tests on stand-in GPUs share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def as_users_run(poisoned_memory: None) -> None:
    """Without the suite's filling of new memory, which would be launches of its own."""
    torch.use_deterministic_algorithms(False)
