"""`F.scaled_dot_product_attention` as memory retrieval: queries attend to the normalised prototypes.

Folded: all N queries are one sequence, batch 1, one head. Expanded: a batch of B images, each with N/B queries, and the
memory expanded along the batch, as attention code that thinks in batches has it.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Case, Function, Implementation, Unavailable

# FLASH_ATTENTION is also the name of the blocked CPU kernel; the other two fused backends are GPU kernels.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
GPU_ONLY = ("efficient", "cudnn")


def build(backend: str, expanded: bool, case: Case, device: str) -> Function:
    """Attention of one backend; LayerNorm of queries and prototypes included.

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
            read = F.scaled_dot_product_attention(state, keys, keys)
        return read.reshape(-1, d)

    return retrieve


IMPLEMENTATIONS = tuple(
    Implementation(
        f"SDPA {backend} {'expanded' if expanded else 'folded'}",
        "retrieve",
        partial(build, backend, expanded),
        stored=4 if backend == "math" else 0,
    )
    for backend in BACKENDS
    for expanded in (False, True)
)
