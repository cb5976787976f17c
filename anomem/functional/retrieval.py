"""Memory retrieval and the figures that describe a memory in use."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from anomem import backends
from anomem.backends import Impl
from anomem.functional.precision import accumulator, autocast_inputs, scalar, unit_inner_stride, without_autocast
from anomem.reference.normalize import Normalize, normalize_rows
from anomem.reference.retrieval import hopfield_retrieve as reference_retrieve
from anomem.reference.retrieval import weights_entropy
from anomem.reference.usage import MemoryDiagnostics
from anomem.reference.usage import memory_diagnostics as reference_diagnostics
from anomem.validation import (
    NORMALIZE,
    require,
    require_choice,
    require_count,
    require_number,
    require_same_kind,
    require_tensor,
)


@overload
def hopfield_retrieve(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = ...,
    beta: float | Tensor | None = ...,
    steps: int = ...,
    normalize: Normalize = ...,
    shrink: float = ...,
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
    shrink: float = ...,
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
    shrink: float = 0.0,
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
        shrink: threshold of MemAE's hard shrinkage of the weights (Gong et al. 2019, Eq. 7); 0 is off.
        return_lse: also give logsumexp(beta q Kᵀ) of the last read; −lse/beta is the Hopfield energy up to |q|² terms.
        return_entropy: also give the entropy of each query's weights, in nats.
        impl: which implementation; see the package.

    Returns:
        out [..., dv] in query's dtype; with `return_lse` or `return_entropy` a tuple of out and, in this order, lse
        [...] and entropy [...], both in float32 (float64 for float64). All are differentiable.

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.
    """
    _check(query, prototypes, beta, normalize)
    require_count(steps, "steps", 1)
    require_number(shrink, "shrink")
    require(not isinstance(shrink, Tensor) and 0 <= shrink < 1, "shrink", "a number in [0, 1)", shrink)
    query, prototypes, values = autocast_inputs(query, prototypes, values)
    require_same_kind(prototypes, "prototypes", query, "query")
    if values is not None:
        require_tensor(values, "values", (2,), "[M, dv]")
        require_same_kind(values, "values", query, "query")
        rows = prototypes.shape[0]
        require(values.shape[0] == rows, "values", lambda: f"[{rows}, dv], one row per prototype", values)
    if beta is None:
        beta = query.shape[-1] ** -0.5

    operator = "shrink" if shrink > 0 or return_entropy else "retrieve"
    chosen = backends.choose(_problem(operator, query, prototypes), impl)
    if chosen == "reference":
        out, lse, entropy = _by_reference(
            query, prototypes, values, beta, steps, normalize, float(shrink), return_entropy
        )
    else:
        out, lse, entropy = _by_kernel(
            query, prototypes, values, beta, steps, normalize, float(shrink), operator, chosen
        )
    extras = ([lse] if return_lse else []) + ([entropy] if return_entropy and entropy is not None else [])
    return (out, *extras) if extras else out


def memory_diagnostics(
    query: Tensor,
    prototypes: Tensor,
    *,
    beta: float | Tensor | None = None,
    normalize: Normalize = "layer",
    impl: Impl = "auto",
) -> MemoryDiagnostics:
    """Usage counts, perplexity and effective number of prototypes over a set of queries; no gradient.

    Args:
        query: [..., d], at least one row.
        prototypes: [M, d].
        beta: as in `hopfield_retrieve`.
        normalize: as in `hopfield_retrieve`.
        impl: which implementation.

    Returns:
        `MemoryDiagnostics(usage [M], mass [M], entropy, perplexity, effective, mean_length)`.

    Raises:
        ArgumentError: as `hopfield_retrieve`, or no query at all.
    """
    _check(query, prototypes, beta, normalize)
    query, prototypes = autocast_inputs(query.detach(), prototypes.detach())
    require_same_kind(prototypes, "prototypes", query, "query")
    flat = query.reshape(-1, query.shape[-1])  # [N, d]
    require(flat.shape[0] > 0, "query", "at least one row", query)
    if beta is None:
        beta = query.shape[-1] ** -0.5
    chosen = backends.choose(_problem("usage", flat, prototypes), impl)
    with torch.no_grad(), without_autocast(query.device.type):
        if chosen == "reference":
            dtype = accumulator(flat)
            return reference_diagnostics(flat.to(dtype), prototypes.to(dtype), beta=beta, normalize=normalize)
        from anomem.ops.inference import usage

        learned, scale = scalar(beta, flat)
        counts, mass, entropy, direction = usage(
            unit_inner_stride(flat), prototypes.contiguous(), learned, scale, normalize
        )
        mean_entropy = entropy.mean()
        mean_length = torch.linalg.vector_norm(direction)
        return MemoryDiagnostics(
            counts, mass, mean_entropy, mean_entropy.exp(), weights_entropy(mass).exp(), mean_length
        )


def _check(query: Tensor, prototypes: Tensor, beta: float | Tensor | None, normalize: str) -> None:
    require_tensor(query, "query", (), "[..., d]")
    require_tensor(prototypes, "prototypes", (2,), "[M, d]")
    features = query.shape[-1]
    require(features > 0, "query", "[..., d] with d ≥ 1", query)
    require(prototypes.shape[1] == features, "prototypes", lambda: f"[M, {features}] as query's rows", prototypes)
    require(prototypes.shape[0] > 0, "prototypes", "at least one row", prototypes)
    require(
        prototypes.device == query.device,
        "prototypes",
        lambda: f"the device of `query` ({query.device})",
        prototypes.device,
    )
    require_choice(normalize, "normalize", NORMALIZE)
    if beta is not None:
        require_number(beta, "beta")


def _problem(operator: str, query: Tensor, prototypes: Tensor) -> backends.Problem:
    columns, features = prototypes.shape
    return backends.Problem(
        operator, query.device.type, query.dtype, features, rows=query.numel() // features, columns=columns
    )


def _by_reference(
    query: Tensor,
    prototypes: Tensor,
    values: Tensor | None,
    beta: float | Tensor,
    steps: int,
    normalize: Normalize,
    shrink: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = accumulator(query)
    with without_autocast(query.device.type):
        read = reference_retrieve(
            query.to(dtype),
            prototypes.to(dtype),
            values=None if values is None else values.to(dtype),
            beta=beta,
            steps=steps,
            normalize=normalize,
            shrink=shrink,
        )
        entropy = weights_entropy(read.weights) if want_entropy else None
    return read.out.to(query.dtype), read.lse, entropy


def _by_kernel(
    query: Tensor,
    prototypes: Tensor,
    values: Tensor | None,
    beta: float | Tensor,
    steps: int,
    normalize: Normalize,
    shrink: float,
    operator: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    from anomem.ops import retrieve, shrinkage

    leading = query.shape[:-1]
    state = unit_inner_stride(query.reshape(-1, query.shape[-1]))  # [N, d]
    keys = prototypes.contiguous()
    learned, scale = scalar(beta, query)
    if steps > 1:
        # Normalised once: an updated state is a mean of normalised prototypes and is read as it is.
        state, keys = normalize_rows(state, normalize), normalize_rows(keys, normalize)
        normalize = "none"
        for _ in range(steps - 1):
            state, _ = retrieve.retrieve(state, keys, None, learned, scale, normalize, backend)
    values = None if values is None else values.contiguous()
    entropy = None
    if operator == "shrink":
        out, lse, entropy = shrinkage.retrieve(state, keys, values, learned, scale, normalize, shrink)
        entropy = entropy.reshape(leading)
    else:
        out, lse = retrieve.retrieve(state, keys, values, learned, scale, normalize, backend)
    return out.reshape(*leading, out.shape[-1]), lse.reshape(leading), entropy
