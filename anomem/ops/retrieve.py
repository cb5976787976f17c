"""Retrieval: `out, lse = softmax(beta norm(q) norm(K)ᵀ) V` with gradients to q, K, V and beta (METHOD, gradients)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomem.ops import batching, composite
from anomem.ops.library import accumulator, define, empty, implement_with_triton, with_known_signature

# The order is the encoding that kernels receive.
NORMALIZE_CODES = {"none": 0, "layer": 1, "l2": 2}
NORMALIZE_NAMES = {code: name for name, code in NORMALIZE_CODES.items()}

_FORWARD_SCHEMA = (
    "(Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize) -> (Tensor out, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor? dlse, Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize, "
    "Tensor out, Tensor lse) -> (Tensor dquery, Tensor dkeys, Tensor dvalues, Tensor dbeta)"
)


# The fakes name the arguments on which shapes depend.
def forward_fake(query: Tensor, keys: Tensor, values: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes of (out, lse)."""
    width = (keys if values is None else values).shape[1]
    return empty(query, query.shape[0], width), empty(query, query.shape[0], dtype=accumulator(query))


def backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of (dquery, dkeys, dvalues, dbeta), the last two empty where there is no such input."""
    dvalues = empty(keys, 0) if values is None else empty(values, *values.shape)
    dbeta = empty(query, *([0] if beta is None else []), dtype=accumulator(query))
    return empty(query, *query.shape), empty(keys, *keys.shape), dvalues, dbeta


for _backend in ("native", "triton"):
    define(f"{_backend}_retrieve_fwd", _FORWARD_SCHEMA, forward_fake)
    define(f"{_backend}_retrieve_bwd", _BACKWARD_SCHEMA, backward_fake)
implement_with_triton("triton_retrieve_fwd")
implement_with_triton("triton_retrieve_bwd")


def retrieve(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Differentiable retrieval by one backend.

    Args:
        query: [N, d], unit inner stride.
        keys: [M, d], contiguous.
        values: [M, dv], contiguous, or None for V = norm(K).
        beta: 0-dim, learned, in the accumulation dtype; or None.
        scale: factor on beta, or beta itself when that is None.
        normalize: "none", "layer" or "l2".
        backend: "native" or "triton".

    Returns:
        out [N, dv] in query's dtype and lse [N] in the accumulation dtype.
    """
    result: tuple[Tensor, Tensor] = _Retrieve.apply(
        query, keys, values, beta, scale, NORMALIZE_CODES[normalize], backend
    )
    return result


@with_known_signature
class _Retrieve(torch.autograd.Function):
    @staticmethod
    def forward(
        query: Tensor,
        keys: Tensor,
        values: Tensor | None,
        beta: Tensor | None,
        scale: float,
        normalize: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        operators = torch.ops.anomem
        run = operators.native_retrieve_fwd if backend == "native" else operators.triton_retrieve_fwd
        out, lse = run(query, keys, values, beta, scale, normalize)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, keys, values, beta, ctx.scale, ctx.normalize, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, keys, values, beta, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, keys, values, beta, out, lse = ctx.saved_tensors
        none = (None, None, None)
        if dout is None and dlse is None:
            return (None, None, None, None, *none)
        if composite.wants_graph():
            inputs = (query, keys, values, beta)
            composed = _composite(ctx.scale, ctx.normalize)
            grads = composite.differentiable_gradients(composed, inputs, ctx.needs_input_grad[:4], (dout, dlse))
            return (*grads, *none)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        operators = torch.ops.anomem
        run = operators.native_retrieve_bwd if ctx.backend == "native" else operators.triton_retrieve_bwd
        dquery, dkeys, dvalues, dbeta = run(dout, dlse, query, keys, values, beta, ctx.scale, ctx.normalize, out, lse)
        return (
            dquery,
            dkeys,
            None if values is None else dvalues,
            None if beta is None else dbeta,
            *none,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if any(dim is not None for dim in in_dims[1:4]):
            return batching.one_by_one(_Retrieve.apply, info.batch_size, in_dims, args)
        query = args[0].movedim(in_dims[0], 0)  # [V, N, d]
        out, lse = _Retrieve.apply(query.reshape(-1, query.shape[-1]).contiguous(), *args[1:])
        return (out.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])), (0, 0)


def _composite(scale: float, normalize: int) -> Any:
    def run(query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
        from anomem.reference import hopfield_retrieve

        dtype = accumulator(query)
        read = hopfield_retrieve(
            query.to(dtype),
            keys.to(dtype),
            values=None if values is None else values.to(dtype),
            beta=scale if beta is None else scale * beta,
            normalize=NORMALIZE_NAMES[normalize],  # type: ignore[arg-type]
        )
        return read.out.to(query.dtype), read.lse

    return run
