"""What every native operator is held to, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anomem.testing import draw


def assert_same_bits_with_any_number_of_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    """Every result of `run`, with one to three threads and with one again."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def assert_compiles_for_any_number_of_rows(loss: Callable[[Tensor, Tensor], Tensor], fixed: Tensor) -> None:
    """Gradients of `loss(rows, fixed)` from one graph, with the bits of the uncompiled ones.

    Args:
        loss: a scalar.
        fixed: [M, d]; the rows are [N, d] for several N.
    """
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    fixed = fixed.requires_grad_()
    for n in (4, 7, 30):
        rows = draw(n, fixed.shape[1], seed=1).requires_grad_()
        expected = torch.autograd.grad(loss(rows, fixed), (rows, fixed))
        got = torch.autograd.grad(compiled(rows, fixed), (rows, fixed))
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
