"""Memory retrieval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import (
    kernel_memory,
    kind_of_call,
    memory_inputs,
    numbers,
    reference_memory,
    without_autocast,
)
from anomem.ops.library import Memory, accumulator, unit_inner_stride
from anomem.reference import Normalize, normalize_rows
from anomem.rules import Impl
from anomem.validation import require, require_count, require_schedule, require_tensor

_LEAST_ROUNDED = 16
"""Features from which on the CPU's kernel rounds weights and prototypes to bfloat16 in products: of fewer, thousands of
prototypes lie so close together that their differences, and the gradients, would lose their digits."""


@overload
def hopfield_retrieve(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = ...,
    beta: float | Tensor | None = ...,
    steps: int = ...,
    normalize: Normalize = ...,
    shrink: float | Tensor = ...,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    impl: Impl = ...,
) -> Tensor: ...
@overload
def hopfield_retrieve(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = ...,
    beta: float | Tensor | None = ...,
    steps: int = ...,
    normalize: Normalize = ...,
    shrink: float | Tensor = ...,
    return_lse: bool = ...,
    return_entropy: bool = ...,
    impl: Impl = ...,
) -> tuple[Tensor, ...]: ...
def hopfield_retrieve(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    shrink: float | Tensor = 0.0,
    return_lse: bool = False,
    return_entropy: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """What a memory returns for each query: softmax(beta · norm(q) norm(K)ᵀ) V (AnoMem Eq. 1; Ramsauer et al. 2021).

    Args:
        query: [..., d], any number of leading axes, none of them special.
        prototypes: [M, d], the stored patterns K; also the values unless `values` is given.
        values: [M, dv], what is read instead of the normalised prototypes.
        beta: inverse temperature, a finite number or a learned 0-dim tensor; 1/sqrt(d) when None.
        steps: number of reads ≥ 1; all but the last update the state, q ← softmax(beta q Kᵀ) K.
        normalize: "layer" (LayerNorm without affine), "l2" or "none", applied to query and prototypes.
        shrink: threshold of MemAE's hard shrinkage of the weights (Gong et al. 2019, Eq. 7), in [0, 1); 0 is off. A
            number, or a 0-dim tensor on the CPU (a schedule).
        return_lse: also give logsumexp(beta q Kᵀ) of the last read; −lse/beta is the Hopfield energy up to |q|² terms.
        return_entropy: also give the entropy of each query's weights, in nats.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Returns:
        out [..., dv] in query's dtype; with `return_lse` or `return_entropy` a tuple of out and, in this order, lse
        [...] and entropy [...], both in float32 (float64 for float64). All are differentiable. The native library keeps
        the memory of large results for later calls; their storage cannot be resized.

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.

    Example:
        >>> out, lse = hopfield_retrieve(torch.randn(2, 5, 16), torch.randn(8, 16), return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5]))
    """
    kind = None
    usual = values is None and type(steps) is int and steps == 1 and type(shrink) is float and shrink == 0
    # By types: True equals 1.0, which is a beta.
    if usual and not (return_lse or return_entropy) and (beta is None or type(beta) is float):
        kind = kind_of_call("retrieve", (query, prototypes), beta, normalize, impl)
        read = backends.remembered(kind)
        if read is not None:
            found: Tensor = read(query, prototypes)
            return found
    require_tensor(query, "query", (), "[..., d]")
    require_count(steps, "steps", 1)
    require_schedule(shrink, "shrink")
    scheduled = isinstance(shrink, Tensor)
    require(scheduled or bool(0 <= shrink < 1), "shrink", "a number in [0, 1)", shrink)
    features = query.shape[-1]
    query, memory = memory_inputs(query, "query", features, prototypes, values, beta, normalize)

    operator = "shrink" if scheduled or shrink > 0 or return_entropy else "retrieve"
    rows, columns = query.numel() // features, prototypes.shape[0]
    problem = rules.problem_of(operator, query, prototypes, features=features, rows=rows, columns=columns, steps=steps)
    chosen = backends.choose(problem, impl)
    if kind is not None and chosen != "reference" and query.dim() == 2 and features >= _LEAST_ROUNDED:
        backends.remember(kind, _reader(query, memory, chosen))
    if chosen == "reference":
        out, lse, entropy = _by_reference(query, memory, steps, shrink, return_lse, return_entropy)
    elif operator == "shrink":
        out, lse, entropy = _by_kernel(query, memory, steps, numbers(shrink)[0], chosen)
    else:
        out, lse, entropy = _by_kernel(query, memory, steps, None, chosen)
    extras = ([lse] if return_lse and lse is not None else []) + (
        [entropy] if return_entropy and entropy is not None else []
    )
    return (out, *extras) if extras else out


def _reader(query: Tensor, memory: Memory, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """One read of prototypes [M, d] by queries [N, d] without checks, for calls of a kind that has passed them.

    Args:
        query: of such a call, [N, d].
        memory: of such a call; its number and normalisation are taken.
        backend: "native" or "triton".
    """
    from anomem.ops import retrieve

    if backend == "native" and query.shape[0] < retrieve.LEAST_KEPT:
        return retrieve.few_reader(memory.scale, memory.normalize)

    def read(query: Tensor, prototypes: Tensor) -> Tensor:
        known = Memory(prototypes.contiguous(), None, None, memory.scale, memory.normalize)
        return retrieve.retrieve(unit_inner_stride(query), known, backend)[0]

    return read


def _by_reference(
    query: Tensor, memory: Memory, steps: int, shrink: float | Tensor, want_lse: bool, want_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = accumulator(query)
    with without_autocast(query.device.type):
        given = reference_memory(memory, dtype)
        values = given.pop("values")
        logits, keys = reference.retrieval_logits(query.to(dtype), **given, steps=steps)
        lse = torch.logsumexp(logits, dim=-1) if want_lse else None
        weights = reference.retrieval_weights(logits, shrink)
        entropy = reference.weights_entropy(weights) if want_entropy else None
        out = weights @ (keys if values is None else values)
    return out.to(query.dtype), lse, entropy


def _by_kernel(
    query: Tensor, memory: Memory, steps: int, shrink: float | Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`shrink` is None where neither shrinkage nor the entropy is wanted."""
    from anomem.ops import retrieve

    dtype = query.dtype
    if backend == "native" and dtype == torch.bfloat16 and query.shape[-1] < _LEAST_ROUNDED and not query.is_cuda:
        query = query.float()
        values = None if memory.values is None else memory.values.float()
        memory = memory._replace(keys=memory.keys.float(), values=values)
    flat = query.dim() == 2
    rows = query.numel() // query.shape[-1]  # not −1: an empty vmap cannot tell it
    state = unit_inner_stride(query if flat else query.reshape(rows, query.shape[-1]))  # [N, d]
    memory = kernel_memory(memory)
    if steps > 1:
        # Normalised once: an updated state is a mean of normalised prototypes and is read as it is.
        wide = accumulator(state)
        state, keys = (normalize_rows(x.to(wide), memory.normalize).to(x.dtype) for x in (state, memory.keys))
        memory = memory._replace(keys=keys, normalize="none")
        for _ in range(steps - 1):
            state, _ = retrieve.retrieve(state, memory._replace(values=None), backend)
    entropy = None
    if shrink is None:
        out, lse = retrieve.retrieve(state, memory, backend)
    else:
        out, lse, entropy = retrieve.shrink(state, memory, shrink)
    if out.dtype != dtype:  # a conversion to the same dtype costs a small call as much as a check of an argument
        out = out.to(dtype)
    if flat:
        return out, lse, entropy
    leading = query.shape[:-1]
    entropy = None if entropy is None else entropy.reshape(leading)
    return out.reshape(*leading, out.shape[-1]), lse.reshape(leading), entropy
