"""The read of a filled memory."""

from __future__ import annotations

from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import bank_inputs, kernel_memory, without_autocast
from anomem.ops.library import Memory, accumulator, unit_inner_stride
from anomem.ops.nearest import MOST
from anomem.reference import MemoryRead, Normalize
from anomem.reference.retrieve import NORMALIZE
from anomem.rules import Impl
from anomem.validation import (
    require,
    require_choice,
    require_count,
    require_number,
    require_same_device,
    require_tensor,
)


def read_memory(
    query: Tensor,
    prototypes: Tensor,
    *,
    beta: float | Tensor | None = None,
    normalize: Normalize = "layer",
    bias: Tensor | None = None,
    top_k: int | None = None,
    nearest: bool = False,
    deviation: bool = False,
    impl: Impl = "auto",
    part: bool = False,
) -> MemoryRead:
    """What a filled memory returns for each query, and how far it is, in one pass.

    The weights are softmax(beta · norm(q) norm(K)ᵀ + bias), over all prototypes or over the `top_k` largest scores;
    the read is their sum of norm(K) (AnoMem Eq. 1). With beta = 2/tau and bias = −|m|²/tau it is the softmax of squared
    distances (ProCon 2026), with `top_k=1` the nearest neighbour (PatchCore).

    Args:
        query: [..., d]; for several banks [L, N, d], or [N, d], which reads all of them.
        prototypes: [M, d], or L banks [L, M, d].
        beta: inverse temperature, a finite number or a learned 0-dim tensor; 1/sqrt(d) when None.
        normalize: "layer" (LayerNorm without affine), "l2" or "none", of query and prototypes.
        bias: [M], or [L, M] for banks, added to the scores.
        top_k: how many prototypes are read, at most 32; all when None.
        nearest: also find the nearest of all prototypes.
        deviation: give norm(q) − read in place of the read.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        `MemoryRead(out, residual, cosine, distance, indices, entropy, lse)`: out [..., d] in query's dtype, the others
        [...] in float32 (float64 for float64); distance and indices are None without `nearest`. For banks all begin
        with the axis L. All but the index are differentiable; the gradient is the reference's, in blocks of queries.
        Where the largest score that is read is infinite (every bias is −inf, a product overflows), lse is that score
        and the weights are NaN. A score of NaN is read after all others and makes its query's results NaN. A prototype
        with a NaN or an infinity may also spoil queries that do not read it.

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.

    Example:
        >>> found = read_memory(torch.randn(100, 16), torch.randn(8, 16), top_k=4, nearest=True)
        >>> found.out.shape, found.residual.shape, found.indices.shape
        (torch.Size([100, 16]), torch.Size([100]), torch.Size([100]))
    """
    require_choice(normalize, "normalize", NORMALIZE)
    rows, banks, shape = bank_inputs(query, "query", prototypes)
    count, features = banks.shape[1:]
    if beta is None:
        beta = float(features) ** -0.5  # a number of a symbolic size too
    require_number(beta, "beta")
    if top_k is not None:
        require_count(top_k, "top_k", 1)
        require(top_k <= min(count, MOST), "top_k", lambda: f"at most {min(count, MOST)}, or None", top_k)
    if bias is not None:
        require_tensor(bias, "bias", (1, 2), "[M] or [L, M]")
        expected = prototypes.shape[:-1]
        require(bias.shape == expected, "bias", lambda: f"{list(expected)}, one number per prototype", bias)
        require_same_device(bias, "bias", rows, "query")
    learned, scale = (beta, 1.0) if isinstance(beta, Tensor) else (None, beta)
    memory = Memory(banks, None, learned, scale, normalize)
    problem = rules.problem_of(
        "read", rows, banks, features=features, rows=rows.shape[1], columns=count, groups=banks.shape[0]
    )
    chosen = backends.choose(problem, impl, part=part)
    dtype = accumulator(rows)
    if bias is not None:
        bias = bias.to(dtype).reshape(banks.shape[:2])
    with without_autocast(rows.device.type):
        if chosen == "reference":
            found = reference.read_memory(
                rows.to(dtype),
                banks.to(dtype),
                beta=memory.inverse_temperature,
                normalize=normalize,
                bias=bias,
                top_k=top_k,
                want_nearest=nearest,
                deviation=deviation,
            )
            found = found._replace(out=found.out.to(rows.dtype))
        else:
            from anomem.ops import read as operators

            bias = None if bias is None else bias.contiguous()
            options = top_k or 0, nearest, deviation, chosen
            found = MemoryRead(*operators.read(unit_inner_stride(rows), kernel_memory(memory), bias, *options))
    distance, indices = (found.distance, found.indices) if nearest else (None, None)
    return MemoryRead(
        found.out.reshape(*shape, features),
        found.residual.reshape(shape),
        found.cosine.reshape(shape),
        None if distance is None else distance.reshape(shape),
        None if indices is None else indices.reshape(shape),
        found.entropy.reshape(shape),
        found.lse.reshape(shape),
    )
