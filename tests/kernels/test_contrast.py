"""The contrastive operators below the documented functions; what they compute is held by tests/operators."""

from __future__ import annotations

import torch

import anomem.ops.contrast  # noqa: F401  registers the operators
from anomem.testing import draw


def test_an_index_out_of_range_gives_nan_where_it_cannot_be_checked() -> None:
    """On a GPU a check would wait for the device."""
    rows, bad = draw(1, 3, 16), torch.tensor([0, 3, 1])
    loss = torch.ops.anomem.triton_info_nce_fwd(rows, rows, bad, None, None, 0.2)[0]
    assert loss.isnan().tolist() == [[False, True, False]]
