"""The read of a filled memory in one pass; its gradient by the reference, in blocks of queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anomem import reference
from anomem.ops import library
from anomem.ops.library import (
    LIBRARY,
    NORMALIZE_CODES,
    Memory,
    accumulator,
    define,
    empty,
)

_NORMALIZE_NAMES = {code: name for name, code in NORMALIZE_CODES.items()}
BLOCK_SCORES = 2**22
"""Of a block of queries in the backward: 16 MiB for each of a few matrices."""
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _read_fake(
    query: Tensor,
    keys: Tensor,
    beta: Tensor | None,
    scale: float,
    bias: Tensor | None,
    normalize: int,
    top_k: int,
    nearest: bool,
    deviation: bool,
) -> Results:
    banks, count, dtype = keys.shape[0], query.shape[1], accumulator(query)

    def numbers(given: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return empty(query, banks, count if given else 0, dtype=dtype)

    return (
        empty(query, banks, count, query.shape[2]),
        numbers(),
        numbers(),
        numbers(nearest),
        numbers(nearest, torch.int64),
        numbers(),
        numbers(),
    )


def _read_backward_fake(
    grads: list[Tensor], query: Tensor, keys: Tensor, beta: Tensor | None, scale: float, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = empty(query, 0, dtype=accumulator(query)) if bias is None else empty(bias, *bias.shape)
    return empty(query, *query.shape), empty(keys, *keys.shape), library.empty_scalar(beta, query), dbias


_ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor? beta, float scale, Tensor? bias, int normalize, int top_k, bool nearest, "
    "bool deviation"
)
for _backend in ("native", "triton"):
    define(
        f"{_backend}_read",
        f"({_ARGUMENTS}) -> (Tensor out, Tensor residual, Tensor cosine, Tensor distance, Tensor index, "
        "Tensor entropy, Tensor lse)",
        _read_fake,
    )
define(
    "reference_read_bwd",
    f"(Tensor[] grads, {_ARGUMENTS}) -> (Tensor dquery, Tensor dkeys, Tensor dbeta, Tensor dbias)",
    _read_backward_fake,
)


def read(
    query: Tensor,
    memory: Memory,
    bias: Tensor | None,
    top_k: int,
    nearest: bool,
    deviation: bool,
    backend: str,
) -> Results:
    """Read the banks of a memory.

    Args:
        query: [L, N, d] or [1, N, d], unit inner stride.
        memory: keys [L, M, d] contiguous, no values, beta in the accumulation dtype.
        bias: [L, M] contiguous in the accumulation dtype, or None.
        top_k: prototypes that are read, at most `anomem.ops.nearest.MOST`; 0 for all.
        nearest: whether to find the nearest prototype.
        deviation: whether to give norm(q) − read.
        backend: "native" or "triton".

    Returns:
        out [L, N, d] in query's dtype; residual, cosine, distance, index (int64), entropy and lse [L, N] in the
        accumulation dtype. Without `nearest`, distance and index are [L, 0].
    """
    keys, _, beta, scale, normalize = memory.operands
    options = normalize, top_k, nearest, deviation, backend
    result: Results = library.apply(_Read, query, keys, beta, scale, bias, *options)
    return result


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        query: Tensor,
        keys: Tensor,
        beta: Tensor | None,
        scale: float,
        bias: Tensor | None,
        normalize: int,
        top_k: int,
        nearest: bool,
        deviation: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return tuple(
            library.call("read", backend, query, keys, beta, scale, bias, normalize, top_k, nearest, deviation)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, keys, beta, ctx.scale, bias, *ctx.options, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[4])
        ctx.save_for_backward(query, keys, beta, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, keys, beta, bias = library.contiguous(ctx.saved_tensors)
        upstream = (*upstream[:4], None, *upstream[5:])
        if all(grad is None for grad in upstream):
            return (None,) * 10
        if library.wants_graph() or library.is_batched(*upstream):
            composite = _composite(ctx.scale, *ctx.options)
            needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
            dquery, dkeys, dbeta, dbias = library.differentiable_gradients(
                composite, (query, keys, beta, bias), needed, upstream
            )
            return dquery, dkeys, dbeta, None, dbias, None, None, None, None, None
        grads = [query.new_empty(0) if grad is None else grad for grad in upstream]
        dquery, dkeys, dbeta, dbias = torch.ops.anomem.reference_read_bwd(
            grads, query, keys, beta, ctx.scale, bias, *ctx.options
        )
        return (
            dquery, dkeys, None if beta is None else dbeta, None, None if bias is None else dbias,
            None, None, None, None, None,
        )  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return library.vmap(_Read.apply, 0, info, in_dims, args)


def _composite(
    scale: float, normalize: int, top_k: int, nearest: bool, deviation: bool
) -> Callable[..., tuple[Tensor, ...]]:
    name = _NORMALIZE_NAMES[normalize]

    def composite(query: Tensor, keys: Tensor, beta: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        found = reference.read_memory(
            query,
            keys,
            beta=Memory(keys, None, beta, scale, name).inverse_temperature,
            normalize=name,
            bias=bias,
            top_k=top_k or None,
            want_nearest=nearest,
            deviation=deviation,
        )
        nothing = found.lse.new_empty(len(keys), 0)
        return tuple(nothing if x is None else x for x in found)

    return composite


def _read_backward(
    grads: list[Tensor],
    query: Tensor,
    keys: Tensor,
    beta: Tensor | None,
    scale: float,
    bias: Tensor | None,
    normalize: int,
    top_k: int,
    nearest: bool,
    deviation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    composite = _composite(scale, normalize, top_k, nearest, deviation)
    dtype = accumulator(query)
    dquery = torch.empty_like(query, memory_format=torch.contiguous_format)
    shared = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (keys, beta, bias)]
    present = [x for x in shared if x is not None]
    sums = [torch.zeros_like(x) for x in present]
    rows = max(1, BLOCK_SCORES // (keys.shape[0] * keys.shape[1]))
    # Not torch.func.vjp: it refuses to run under saved-tensors hooks.
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        for first in range(0, query.shape[1], rows):
            part = slice(first, first + rows)
            block = query.detach()[:, part].to(dtype).requires_grad_()
            pairs = zip(composite(block, *shared), grads, strict=True)
            used = [(out, grad[:, part]) for out, grad in pairs if grad.dim() > 1]
            gradients = torch.autograd.grad(
                [out for out, _ in used],
                [block, *present],
                [grad.to(out.dtype) for out, grad in used],
                allow_unused=True,
                materialize_grads=True,
            )
            dquery[:, part] = gradients[0]
            for total, gradient in zip(sums, gradients[1:], strict=True):
                total += gradient
    given = iter(sums)
    dkeys = next(given).to(keys.dtype)
    dbeta = query.new_empty(0, dtype=dtype) if beta is None else next(given).to(beta.dtype)
    dbias = query.new_empty(0, dtype=dtype) if bias is None else next(given).to(bias.dtype)
    return dquery, dkeys, dbeta, dbias


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("reference_read_bwd", _read_backward, _key)
