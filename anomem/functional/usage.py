"""The figures that describe a memory in use."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import (
    kernel_memory,
    memory_inputs,
    reference_memory,
    without_autocast,
)
from anomem.ops.library import accumulator, unit_inner_stride
from anomem.reference import MemoryDiagnostics, Normalize, weights_entropy
from anomem.rules import Impl
from anomem.validation import require, require_tensor


def memory_diagnostics(
    query: Tensor,
    prototypes: Tensor,
    *,
    beta: float | Tensor | None = None,
    normalize: Normalize = "layer",
    impl: Impl = "auto",
    part: bool = False,
) -> MemoryDiagnostics:
    """Usage counts, perplexity and effective number of prototypes over a set of queries; no gradient.

    Args:
        query: [..., d], at least one row.
        prototypes: [M, d].
        beta: as in `hopfield_retrieve`.
        normalize: as in `hopfield_retrieve`.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        `MemoryDiagnostics(usage [M], mass [M], entropy, perplexity, effective, mean_length)`.

    Raises:
        ArgumentError: as `hopfield_retrieve`, or no query at all.

    Example:
        >>> found = memory_diagnostics(torch.randn(100, 16), torch.randn(8, 16))
        >>> int(found.usage.sum()), round(float(found.mass.sum()), 3)
        (100, 1.0)
    """
    require_tensor(query, "query", (), "[..., d]")
    features = query.shape[-1]
    query, memory = memory_inputs(query.detach(), "query", features, prototypes, None, beta, normalize)
    memory = memory._replace(keys=memory.keys.detach())
    rows = query.reshape(-1, features)  # [N, d]
    require(rows.shape[0] > 0, "query", "at least one row", query)
    problem = rules.problem_of(
        "usage", rows, prototypes, features=features, rows=rows.shape[0], columns=prototypes.shape[0]
    )
    chosen = backends.choose(problem, impl, part=part)
    with torch.no_grad(), without_autocast(rows.device.type):
        if chosen == "reference":
            dtype = accumulator(rows)
            arguments = reference_memory(memory, dtype)
            del arguments["values"]
            return reference.memory_diagnostics(rows.to(dtype), **arguments)
        from anomem.ops.usage import usage

        counts, mass, entropy, direction = usage(unit_inner_stride(rows), kernel_memory(memory))
        mean_entropy = entropy.mean()
        mean_length = torch.linalg.vector_norm(direction)
        return MemoryDiagnostics(
            counts, mass, mean_entropy, mean_entropy.exp(), weights_entropy(mass).exp(), mean_length
        )
