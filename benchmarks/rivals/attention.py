"""Retrieval by attention code: SDPA, FlexAttention and the formula of hopfield-layers.

Queries attend to the normalised prototypes. Folded: all N queries are one sequence, batch 1, one head. Expanded: a
batch of B images, each with N/B queries, and the memory expanded along the batch.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.case import Case, Function, Implementation
from benchmarks.harness.rows import Unavailable

# FLASH_ATTENTION is also the name of the blocked CPU kernel; the other two fused backends are GPU kernels.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
GPU_ONLY = ("efficient", "cudnn")


def sdpa(backend: str, expanded: bool, case: Case, device: str) -> Function:
    """`F.scaled_dot_product_attention` by one backend; LayerNorm of queries and prototypes included.

    Raises:
        Unavailable: the backend has no kernel for this device.
    """
    if device == "cpu" and backend in GPU_ONLY:
        raise Unavailable(f"torch has no {backend} attention kernel for CPUs")
    batch = case.dims["B"] if expanded else 1

    def retrieve(query: Tensor, prototypes: Tensor) -> Tensor:
        d = query.shape[-1]
        state = F.layer_norm(query, (d,)).view(batch, 1, -1, d)  # [B, 1, N/B, d]
        keys = F.layer_norm(prototypes, (d,)).expand(batch, 1, -1, d)  # [B, 1, M, d]
        with sdpa_kernel(BACKENDS[backend]):
            retrieved = F.scaled_dot_product_attention(state, keys, keys)
        return retrieved.reshape(-1, d)

    return retrieve


def flex(case: Case, device: str) -> Function:
    """Compiled FlexAttention, folded, without a mask or a score function; LayerNorm included.

    Raises:
        Unavailable: a backward pass on a CPU.
    """
    if device == "cpu" and case.training:
        raise Unavailable("FlexAttention has no backward pass on CPUs")
    from torch.nn.attention.flex_attention import flex_attention

    def retrieve(query: Tensor, prototypes: Tensor) -> Tensor:
        d = query.shape[-1]
        # Axes first, then LayerNorm: inductor's CPU template takes no view of a matrix that is not computed yet.
        state = F.layer_norm(query[None, None], (d,))  # [1, 1, N, d]
        keys = F.layer_norm(prototypes[None, None], (d,))  # [1, 1, M, d]
        return flex_attention(state, keys, keys)[0, 0]

    function: Function = torch.compile(retrieve, dynamic=False)
    return function


def hopfield_layers(case: Case, device: str) -> Function:
    """The static lookup softmax(β LN(R) LN(Y)ᵀ) LN(Y) of hopfield-layers (Ramsauer et al. 2021), from its definition.

    One head, no projection, one update. The stored patterns are repeated for each of B images, then normalised, then
    multiplied with the image's N/B queries in a batched product.
    """
    batch = case.dims["B"]

    def retrieve(query: Tensor, prototypes: Tensor) -> Tensor:
        d = query.shape[-1]
        state = F.layer_norm(query.view(batch, -1, d), (d,))  # [B, N/B, d]
        stored = F.layer_norm(prototypes.repeat(batch, 1, 1), (d,))  # [B, M, d]
        weights = torch.softmax(torch.bmm(state * d**-0.5, stored.mT), dim=-1)  # [B, N/B, M]
        return torch.bmm(weights, stored).view(-1, d)

    return retrieve


IMPLEMENTATIONS = (
    *(
        Implementation(
            f"SDPA {backend} {'expanded' if expanded else 'folded'}",
            "retrieve",
            partial(sdpa, backend, expanded),
            stored=4 if backend == "math" else 0,
        )
        for backend in BACKENDS
        for expanded in (False, True)
    ),
    Implementation("FlexAttention", "retrieve", flex, compiles=True),
    Implementation("hopfield-layers (formula)", "retrieve", hopfield_layers, stored=4),
)
