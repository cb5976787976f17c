"""Retrieval, `out, lse = softmax(beta norm(q) norm(K)ᵀ) V`, and the same with MemAE's shrinkage and the entropy.

Gradients go to q, K, V and beta; `anomem.reference.retrieve` derives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anomem import reference
from anomem.ops import library
from anomem.ops.library import (
    NORMALIZE_CODES,
    Memory,
    accumulator,
    define,
    empty,
    operator,
    unit_inner_stride,
)
from anomem.reference.retrieve import Normalize

KEPT_BYTES = 31 << 20
"""Most memory that one call on a CPU keeps for its backward pass; the weights of other queries are recomputed.

In trials (AMD family 25; Intel family 6 with AMX) keeping more gained little or nothing.
"""
_MOST_OUTPUT = KEPT_BYTES
"""Of a memory read in blocks, bfloat16: more than this of outputs in float32 is not kept, as in csrc/cpu/retrieve.h."""
LEAST_KEPT = 126
"""Queries of a call that keeps anything."""
_LEAST_IN_BLOCKS = 512
"""Prototypes, of any dtype; `reads_in_blocks` of csrc/cpu/retrieve.h decides."""
_NORMALIZE_NAMES = {code: name for name, code in NORMALIZE_CODES.items()}


def _retrieve_fake(
    query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None, scale: float, normalize: int
) -> tuple[Tensor, Tensor]:
    width = (keys if values is None else values).shape[1]
    return empty(query, query.shape[0], width), empty(query, query.shape[0], dtype=accumulator(query))


def _triton_retrieve_fake(
    query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None, scale: float, normalize: int
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _retrieve_fake(query, keys, values, beta, scale, normalize)
    return out, lse, empty(query, query.shape[0], 2, dtype=accumulator(query))


def _retrieve_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: int,
    out: Tensor,
    lse: Tensor,
    normaliser: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dvalues = empty(keys, 0) if values is None else empty(values, *values.shape)
    return empty(query, *query.shape), empty(keys, *keys.shape), dvalues, library.empty_scalar(beta, query)


def _kept_fake(
    query: Tensor, keys: Tensor, values: Tensor | None, scale: float, normalize: int, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _retrieve_fake(query, keys, values, None, scale, normalize)
    width, dtype = _kept_row(query, keys, values)
    return out, lse, empty(query, kept, width, dtype=dtype)


def _kept_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    scale: float,
    normalize: int,
    lse: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _retrieve_backward_fake(dout, dlse, query, keys, values, None, scale, normalize, dout, lse)[:3]


def _shrink_fake(
    query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None, scale: float, normalize: int, shrink: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _retrieve_fake(query, keys, values, beta, scale, normalize)
    return out, lse, torch.empty_like(lse)


def _shrink_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: int,
    shrink: float,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _retrieve_backward_fake(dout, dlse, query, keys, values, beta, scale, normalize, dout, lse)


define(
    "native_retrieve_fwd",
    "(Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize) -> (Tensor out, Tensor lse)",
    _retrieve_fake,
)
define(
    "triton_retrieve_fwd",
    "(Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize) -> "
    "(Tensor out, Tensor lse, Tensor normaliser)",
    _triton_retrieve_fake,
)
define(
    "native_retrieve_bwd",
    "(Tensor dout, Tensor? dlse, Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize, "
    "Tensor out, Tensor lse) -> (Tensor dquery, Tensor dkeys, Tensor dvalues, Tensor dbeta)",
    _retrieve_backward_fake,
)
define(
    "triton_retrieve_bwd",
    "(Tensor dout, Tensor? dlse, Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize, "
    "Tensor out, Tensor lse, Tensor normaliser) -> (Tensor dquery, Tensor dkeys, Tensor dvalues, Tensor dbeta)",
    _retrieve_backward_fake,
)
define(
    "native_retrieve_kept_fwd",
    "(Tensor query, Tensor keys, Tensor? values, float scale, int normalize, int kept) -> "
    "(Tensor out, Tensor lse, Tensor weights)",
    _kept_fake,
)
define(
    "native_retrieve_kept_bwd",
    "(Tensor dout, Tensor? dlse, Tensor query, Tensor keys, Tensor? values, float scale, int normalize, Tensor lse, "
    "Tensor weights) -> (Tensor dquery, Tensor dkeys, Tensor dvalues)",
    _kept_backward_fake,
)
define(
    "native_retrieve_blocks", "(Tensor query, Tensor keys, Tensor? values) -> bool", lambda query, keys, values: False
)
define(
    "native_shrink_fwd",
    "(Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize, float shrink) -> "
    "(Tensor out, Tensor lse, Tensor entropy)",
    _shrink_fake,
    scheduled=("shrink",),
)
define(
    "native_shrink_bwd",
    "(Tensor dout, Tensor? dlse, Tensor? dentropy, Tensor query, Tensor keys, Tensor? values, Tensor? beta, "
    "float scale, int normalize, float shrink, Tensor lse) -> "
    "(Tensor dquery, Tensor dkeys, Tensor dvalues, Tensor dbeta)",
    _shrink_backward_fake,
    scheduled=("shrink",),
)


def retrieve(query: Tensor, memory: Memory, backend: str) -> tuple[Tensor, Tensor]:
    """Differentiable retrieval by one backend.

    Args:
        query: [N, d], unit inner stride.
        memory: keys [M, d] and values [M, dv] contiguous, beta in the accumulation dtype.
        backend: "native" or "triton".

    Returns:
        out [N, dv] in query's dtype and lse [N] in the accumulation dtype.
    """
    kept = _kept(query, memory) if backend == "native" else 0
    result: tuple[Tensor, ...] = library.apply(_Retrieve, query, *memory.operands, None, backend, kept)
    return result[0], result[1]


def _kept(query: Tensor, memory: Memory) -> int:
    """Queries of which the backward pass needs what the forward pass keeps: their weights, 12 NMd flops instead of 14
    for N·M elements; of a memory read in blocks two numbers and the output.

    None in small calls and under a compiler or tracer, whose graphs serve other sizes; none where the gradient of beta
    needs the scores.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or query.shape[0] < LEAST_KEPT:
        return 0
    if query.device.type != "cpu" or memory.beta is not None or query.dtype == torch.float64:
        return 0
    if torch._C._are_functorch_transforms_active():  # vmap would give each element its part of the weights
        return 0
    if not library.may_be_differentiated((query, memory.keys, memory.values)):
        return 0
    width, dtype = _kept_row(query, memory.keys, memory.values)
    return min(query.shape[0], KEPT_BYTES // (width * dtype.itemsize))


def _kept_row(query: Tensor, keys: Tensor, values: Tensor | None) -> tuple[int, torch.dtype]:
    """How many numbers are kept of a query, and their dtype, as in csrc/cpu/retrieve.h."""
    prototypes = keys.shape[0]
    if prototypes >= _LEAST_IN_BLOCKS and operator("retrieve_blocks", "native")(query, keys, values):
        width = 2 + (keys if values is None else values).shape[1]
        too_much = query.dtype == torch.bfloat16 and query.shape[0] * width * 4 > _MOST_OUTPUT
        return 2 if too_much else width, accumulator(query)
    padded = (prototypes + 31) // 32 * 32
    return padded + 32 if padded % 256 == 0 else padded, query.dtype


def shrink(query: Tensor, memory: Memory, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable retrieval with hard shrinkage (MemAE, Gong et al. 2019, Eqs. 6–9), by the native library.

    Args:
        query: as in `retrieve`.
        memory: as in `retrieve`.
        threshold: of the weights, a number or 0-dim on the CPU; 0 keeps the softmax and only adds the entropy.

    Returns:
        out [N, dv], lse [N] and entropy [N] of the weights in nats.
    """
    result: tuple[Tensor, Tensor, Tensor] = library.apply(_Retrieve, query, *memory.operands, threshold, "native", 0)
    return result


def few_reader(scale: float, normalize: Normalize) -> Callable[[Tensor, Tensor], Tensor]:
    """`retrieve` for calls of one kind, by the native library: fewer than `LEAST_KEPT` queries [N, d], and prototypes
    [M, d] that are the values too; only out [N, d] is given.

    A small call's steps in Python take longer than its arithmetic. Nothing may trace or transform it.
    """
    code = NORMALIZE_CODES[normalize]
    forward = torch.ops.anomem.native_retrieve_fwd.default

    def few(query: Tensor, keys: Tensor) -> Tensor:
        query, keys = unit_inner_stride(query), keys.contiguous()
        if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad):
            out: Tensor = _FewReads.apply(query, keys, scale, code)  # type: ignore[no-untyped-call]
            return out
        read: Tensor = forward(query, keys, None, None, scale, code)[0]
        return read

    return few


class _FewReads(torch.autograd.Function):
    """`_Retrieve` in the fewest steps: query [N, d], keys [M, d] that are the values too -> out [N, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, scale: float, normalize: int) -> Tensor:  # type: ignore[override]
        out: Tensor
        out, lse = torch.ops.anomem.native_retrieve_fwd.default(query, keys, None, None, scale, normalize)
        ctx.numbers = scale, normalize
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, keys, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return None, None, None, None
        query, keys, lse = ctx.saved_tensors
        scale, normalize = ctx.numbers
        if library.wants_graph():
            needed = (*ctx.needs_input_grad[:2], False, False)
            composite = _composite(scale, normalize, None, None)
            dquery, dkeys, _, _ = library.differentiable_gradients(
                composite, (query, keys, None, None), needed, (dout, None)
            )
            return dquery, dkeys, None, None
        dout, query, keys, lse = dout.contiguous(), unit_inner_stride(query), keys.contiguous(), lse.contiguous()
        dquery, dkeys, _, _ = torch.ops.anomem.native_retrieve_bwd.default(
            dout, None, query, keys, None, None, scale, normalize, dout, lse
        )
        return dquery, dkeys, None, None


class _Retrieve(torch.autograd.Function):
    """(out, lse), and with a threshold the entropy, where weights are kept these, by Triton the normaliser."""

    @staticmethod
    def forward(
        query: Tensor,
        keys: Tensor,
        values: Tensor | None,
        beta: Tensor | None,
        scale: float,
        normalize: int,
        threshold: float | Tensor | None,
        backend: str,
        kept: int,
    ) -> tuple[Tensor, ...]:
        if kept:
            return tuple(operator("retrieve_kept_fwd", backend)(query, keys, values, scale, normalize, kept))
        if threshold is None:
            return tuple(library.call("retrieve_fwd", backend, query, keys, values, beta, scale, normalize))
        forward = library.overload(operator("shrink_fwd", backend), threshold)
        return tuple(forward(query, keys, values, beta, scale, normalize, threshold))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, keys, values, beta, ctx.scale, ctx.normalize, ctx.threshold, ctx.backend, ctx.kept = inputs
        out, lse, *rest = output
        if ctx.kept or ctx.backend == "triton":  # weights and normaliser are for the backward pass alone
            ctx.mark_non_differentiable(*rest)
        else:
            rest = []  # the entropy
        ctx.set_materialize_grads(False)
        # What is saved may not be changed in place; the native kernels do not read `out` again.
        ctx.save_for_backward(query, keys, values, beta, out if ctx.backend == "triton" else None, lse, *rest)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        upstream = upstream[:2] if ctx.kept or ctx.backend == "triton" else upstream
        query, *saved = ctx.saved_tensors
        query, (keys, values, beta, out, *extras) = unit_inner_stride(query), library.contiguous(saved)
        if all(grad is None for grad in upstream):
            return (None,) * 9
        if library.wants_graph():
            inputs = (query, keys, values, beta)
            needed = list(ctx.needs_input_grad[:4])
            needed[2] &= upstream[0] is not None
            kept = None
            if ctx.threshold is not None:
                kept = _above_threshold(query, keys, beta, ctx.scale, ctx.normalize, ctx.threshold)
            composite = _composite(ctx.scale, ctx.normalize, ctx.threshold, kept)
            grads = library.differentiable_gradients(composite, inputs, needed, upstream)
            return (*grads, None, None, None, None, None)
        width = (keys if values is None else values).shape[1]
        dout = query.new_zeros(query.shape[0], width) if upstream[0] is None else upstream[0].contiguous()
        dextras = [None if grad is None else grad.contiguous() for grad in upstream[1:]]
        if ctx.kept:
            dquery, dkeys, dvalues = operator("retrieve_kept_bwd", ctx.backend)(
                dout, *dextras, query, keys, values, ctx.scale, ctx.normalize, *extras
            )
            dvalues = None if values is None or upstream[0] is None else dvalues
            return dquery, dkeys, dvalues, None, None, None, None, None, None
        given = (dout, *dextras, query, keys, values, beta, ctx.scale, ctx.normalize)
        if ctx.threshold is None:
            out = dout if out is None else out
            dquery, dkeys, dvalues, dbeta = library.call("retrieve_bwd", ctx.backend, *given, out, *extras)
        else:
            shrink_backward = library.overload(operator("shrink_bwd", ctx.backend), ctx.threshold)
            dquery, dkeys, dvalues, dbeta = shrink_backward(*given, ctx.threshold, *extras)
        # What does not depend on the values gives them no gradient, which an optimizer tells from zeros.
        dvalues = None if values is None or upstream[0] is None else dvalues
        return dquery, dkeys, dvalues, None if beta is None else dbeta, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return library.vmap(_Retrieve.apply, 1, info, in_dims, args)


def _above_threshold(
    query: Tensor, keys: Tensor, beta: Tensor | None, scale: float, normalize: int, threshold: float | Tensor
) -> Tensor:
    """[N, M] bool, the weights that the forward pass kept: a weight at the threshold could round to the other side."""
    forward = library.overload(operator("shrink_fwd", "native"), threshold)
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        # What a retrieval reads of an identity is its weights. They do not depend on the values.
        identity = torch.eye(keys.shape[0], dtype=keys.dtype, device=keys.device)
        weights: Tensor = forward(query, keys, identity, beta, scale, normalize, threshold)[0]
    return weights > 0


def _composite(
    scale: float, normalize: int, threshold: float | Tensor | None, kept: Tensor | None
) -> Callable[..., tuple[Tensor, ...]]:
    name = _NORMALIZE_NAMES[normalize]

    def composite(query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None) -> tuple[Tensor, ...]:
        factor = Memory(keys, values, beta, scale, name).inverse_temperature
        out, lse, weights = reference.hopfield_retrieve(
            query,
            keys,
            values=values,
            beta=factor,
            normalize=name,
            shrink=0.0 if threshold is None else threshold,
            kept=kept,
        )
        return (out, lse) if threshold is None else (out, lse, reference.weights_entropy(weights))

    return composite
