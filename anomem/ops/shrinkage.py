"""Retrieval with MemAE's hard shrinkage and the entropy of its weights (Gong et al. 2019, Eqs. 6–9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anomem.ops import batching, composite
from anomem.ops.library import accumulator, define, with_known_signature
from anomem.ops.retrieve import NORMALIZE_CODES, NORMALIZE_NAMES, backward_fake, forward_fake


def _forward_fake(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = forward_fake(query, *arguments)
    return out, lse, torch.empty_like(lse)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, dentropy: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward_fake(dout, dlse, *arguments)


define(
    "native_shrink_fwd",
    "(Tensor query, Tensor keys, Tensor? values, Tensor? beta, float scale, int normalize, float shrink) -> "
    "(Tensor out, Tensor lse, Tensor entropy)",
    _forward_fake,
)
define(
    "native_shrink_bwd",
    "(Tensor dout, Tensor? dlse, Tensor? dentropy, Tensor query, Tensor keys, Tensor? values, Tensor? beta, "
    "float scale, int normalize, float shrink, Tensor out, Tensor lse, Tensor entropy) -> "
    "(Tensor dquery, Tensor dkeys, Tensor dvalues, Tensor dbeta)",
    _backward_fake,
)


def retrieve(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: str,
    shrink: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable shrunk retrieval by the native library; arguments as in `ops.retrieve.retrieve`.

    Args:
        shrink: the threshold; 0 keeps the softmax and only adds the entropy.

    Returns:
        out [N, dv], lse [N] and entropy [N] in nats.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Shrink.apply(
        query, keys, values, beta, scale, NORMALIZE_CODES[normalize], shrink
    )
    return result


@with_known_signature
class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        query: Tensor,
        keys: Tensor,
        values: Tensor | None,
        beta: Tensor | None,
        scale: float,
        normalize: int,
        shrink: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = torch.ops.anomem.native_shrink_fwd
        out, lse, entropy = run(query, keys, values, beta, scale, normalize, shrink)
        return out, lse, entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, keys, values, beta, ctx.scale, ctx.normalize, ctx.shrink = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, keys, values, beta, *output)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, keys, values, beta, out, lse, entropy = ctx.saved_tensors
        if dout is None and dlse is None and dentropy is None:
            return (None,) * 7
        if composite.wants_graph():
            grads = composite.differentiable_gradients(
                _composite(ctx.scale, ctx.normalize, ctx.shrink),
                (query, keys, values, beta),
                ctx.needs_input_grad[:4],
                (dout, dlse, dentropy),
            )
            return (*grads, None, None, None)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse, dentropy = (None if g is None else g.contiguous() for g in (dlse, dentropy))
        arguments = (query, keys, values, beta, ctx.scale, ctx.normalize, ctx.shrink, out, lse, entropy)
        dquery, dkeys, dvalues, dbeta = torch.ops.anomem.native_shrink_bwd(dout, dlse, dentropy, *arguments)
        return (
            dquery,
            dkeys,
            None if values is None else dvalues,
            None if beta is None else dbeta,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return batching.one_by_one(_Shrink.apply, info.batch_size, in_dims, args)


def _composite(scale: float, normalize: int, shrink: float) -> Any:
    def run(query: Tensor, keys: Tensor, values: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        from anomem.reference import hopfield_retrieve, weights_entropy

        dtype = accumulator(query)
        read = hopfield_retrieve(
            query.to(dtype),
            keys.to(dtype),
            values=None if values is None else values.to(dtype),
            beta=scale if beta is None else scale * beta,
            normalize=NORMALIZE_NAMES[normalize],  # type: ignore[arg-type]
            shrink=shrink,
        )
        return read.out.to(query.dtype), read.lse, weights_entropy(read.weights)

    return run
