"""The tests of the C++ library need it built."""

from __future__ import annotations

import pytest

from anomem.ops import native


@pytest.fixture(autouse=True)
def library() -> None:
    """Skips, with the reason, where the library cannot be loaded (`make test` builds it first)."""
    reason = native.obstacle("cpu")
    if reason is not None:
        pytest.skip(reason)
