"""The nearest prototypes of features, and greedy k-center."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import autocast_inputs, bank_inputs, without_autocast
from anomem.ops.library import accumulator, unit_inner_stride
from anomem.ops.nearest import MOST
from anomem.reference import Nearest
from anomem.rules import Impl
from anomem.validation import require, require_count, require_tensor


def nearest(x: Tensor, prototypes: Tensor, *, k: int | None = None, impl: Impl = "auto") -> Nearest:
    """The k nearest prototypes of each row by Euclidean distance; no matrix [N, M], no gradient.

    The distance is the sum of squared differences, not |x|² − 2 x·m + |m|², which would lose digits near 0.

    Args:
        x: [..., d]; for several banks [L, N, d], or [N, d], which is read for all of them.
        prototypes: [M, d], or L banks [L, M, d].
        k: from 1 to M, at most 32; None for the nearest alone, without an axis of its own.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`. The reference does hold [N, M].

    Returns:
        `Nearest(distance, indices)`: squared distances [..., k] (for banks [L, N, k]) in float32 (float64 for float64),
        the smallest first, and int64 indices. Of equal distances the lowest index comes first; a NaN comes last.

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.

    Example:
        >>> distance, index = nearest(torch.randn(100, 16), torch.randn(8, 16))
        >>> index.shape
        torch.Size([100])
    """
    wanted = 1 if k is None else k
    require_count(wanted, "k", 1)
    rows, banks, shape = bank_inputs(x, "x", prototypes)
    count = banks.shape[1]
    require(wanted <= min(count, MOST), "k", lambda: f"at most {min(count, MOST)}", wanted)
    rows, banks = rows.detach(), banks.detach()
    features = rows.shape[2]
    problem = rules.problem_of(
        "nearest", rows, banks, features=features, rows=rows.shape[1], columns=count, groups=banks.shape[0]
    )
    chosen = backends.choose(problem, impl)
    with torch.no_grad(), without_autocast(rows.device.type):
        if chosen == "reference":
            dtype = accumulator(rows)
            distance, index = reference.nearest(rows.to(dtype), banks.to(dtype), wanted)
        else:
            from anomem.ops import nearest as operators

            distance, index = operators.nearest(unit_inner_stride(rows), banks.contiguous(), wanted, chosen)
    shape = shape if k is None else (*shape, k)
    return Nearest(distance.reshape(shape), index.reshape(shape))


def k_center(x: Tensor, count: int, *, first: int = 0, impl: Impl = "auto") -> Tensor:
    """Greedy k-center (Gonzalez 1985), the coreset of PatchCore: each next row is the farthest from all chosen before.

    Args:
        x: [N, d].
        count: of rows to choose, from 1 to N.
        first: the row to begin with.
        impl: as in `nearest`.

    Returns:
        [count] int64, distinct rows; of equally far rows the lowest index. No gradient.

    Raises:
        ArgumentError: as `nearest`.

    Example:
        >>> k_center(torch.tensor([[0.0], [1.0], [5.0], [6.0]]), 3).tolist()
        [0, 3, 1]
    """
    require_tensor(x, "x", (2,), "[N, d]")
    rows, features = x.shape
    require(rows > 0 and features > 0, "x", "at least one row of length ≥ 1", x)
    require_count(count, "count", 1)
    require(count <= rows, "count", lambda: f"at most {rows}, the rows of `x`", count)
    require_count(first, "first", 0)
    require(first < rows, "first", lambda: f"an index from 0 to {rows - 1}", first)
    (x,) = autocast_inputs(x.detach())
    problem = rules.problem_of("nearest", x, features=features, rows=rows, columns=count)
    chosen = backends.choose(problem, impl)
    with torch.no_grad(), without_autocast(x.device.type):
        if chosen == "reference":
            return reference.k_center(x.to(accumulator(x)), count, first)
        from anomem.ops import nearest as operators

        return operators.k_center(unit_inner_stride(x), count, first, chosen)
