"""Retrieval by the library's matrix products over chunks of queries, for any d, dv and M, and for exact float32.

Per chunk of R queries, with S, dP, P, dS of size [R, M] in a scratch that stays in the L2 cache:

    forward    S = norm(Q) Kᵀ;   P = softmax(b S), L = logsumexp(b S)   one Triton pass;   O = P V
    backward   S = norm(Q) Kᵀ;   dP = dO Vᵀ;   P = softmax(b S), b dS = b P ∘ (dP − Σ_m P dP + dL)   one Triton pass
               dQ = (∂norm/∂Q)ᵀ b dS K;   dK += b dSᵀ norm(Q);   dV += Pᵀ dO

S and dP are float32 also for bfloat16 rows: 2⁻⁹ of a logit of 10 would be 2% of P. The chunks are added in order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels import rows
from anomem.kernels.common import LN2, LOG2E, cdiv, device_of, next_power_of_2, round_to
from anomem.kernels.memory import Memory, inverse_temperature, online_softmax
from anomem.kernels.specs import Spec, spec
from anomem.kernels.tiles import Tile

# What S, dP, P and dS of one chunk may take together: about half the L2 cache of an A100 or H100.
SCRATCH_BYTES = 24 * 2**20
# What norm(Q) and float32 dQ of one chunk may take together: only a small memory of long rows comes to it, whose
# scratch would have room for millions of queries.
ROW_BYTES = 64 * 2**20


@triton.jit
def row_sums(scores, dweights, n, N, M, b, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """(shift, Σ_m exp2(b S − shift), Σ_m exp2(b S − shift) dP) of whole rows, each [BLOCK_N]; b in units of log 2.

    Without dweights (None) the third is zero.
    """
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        offsets, mask = within_scratch(n, start + tl.arange(0, BLOCK_M), N, M)
        s = tl.load(scores + offsets, mask=mask, other=float("-inf"))  # [BLOCK_N, BLOCK_M]
        s = tl.where(mask, s * b, float("-inf"))
        p, top, total, shift, rescale = online_softmax(s, top, total)
        if dweights is not None:
            dp = tl.load(dweights + offsets, mask=mask, other=0.0)
            along = along * rescale + tl.sum(p * dp, axis=1)
    return shift, total, along


@triton.jit
def within_scratch(n, m, N, M):
    """Offsets and mask [BLOCK_N, BLOCK_M] in the scratch [N, M], which is far below 2³¹ elements."""
    return n[:, None] * M + m[None, :], (n < N)[:, None] & (m < M)[None, :]


@triton.jit
def _softmax(scores, weights, beta, lse, N, M, scale, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = inverse_temperature(beta, scale) * LOG2E
    shift, total, _ = row_sums(scores, None, n, N, M, b, BLOCK_N, BLOCK_M)
    for start in range(0, M, BLOCK_M):
        offsets, mask = within_scratch(n, start + tl.arange(0, BLOCK_M), N, M)
        s = tl.load(scores + offsets, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(s * b - shift[:, None]) / total[:, None]
        tl.store(weights + offsets, round_to(p, weights.dtype.element_ty), mask=mask)
    tl.store(lse + n, (shift + tl.log2(total)) * LN2, mask=n < N)


@triton.jit
def _softmax_backward(
    scores, dweights, weights, dscores, beta, dlse, dbeta, N, M, scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = inverse_temperature(beta, scale)
    # Not from L and O as the flash scheme must: rounding an L of 200 would cost 1e-5 of P, and rounding O an error of
    # delta that Σ_m dS inherits. The whole rows are at hand.
    shift, total, along = row_sums(scores, dweights, n, N, M, b * LOG2E, BLOCK_N, BLOCK_M)
    delta = along / total  # [BLOCK_N], Σ_m P dP
    if dlse is not None:
        delta -= tl.load(dlse + n, mask=n < N, other=0.0)
    along_beta = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        offsets, mask = within_scratch(n, start + tl.arange(0, BLOCK_M), N, M)
        s = tl.load(scores + offsets, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M], without b
        dp = tl.load(dweights + offsets, mask=mask, other=0.0)
        p = tl.exp2(s * (b * LOG2E) - shift[:, None]) / total[:, None]
        ds = p * (dp - delta[:, None])
        if beta is not None:
            along_beta += tl.sum(tl.where(mask, ds * s, 0.0), axis=1)
        tl.store(weights + offsets, round_to(p, weights.dtype.element_ty), mask=mask)
        tl.store(dscores + offsets, round_to(ds * b, dscores.dtype.element_ty), mask=mask)
    if beta is not None:
        tl.store(dbeta + n, along_beta * scale, mask=n < N)


def forward(query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """out [N, dv] and lse [N]; arguments as in `retrieve_flash.forward`."""
    keys, _, beta, scale, normalize = memory
    v = memory.read
    count, prototypes = query.shape[0], keys.shape[0]
    out, lse = query.new_empty(count, v.shape[1]), query.new_empty(count, dtype=torch.float32)
    for part in chunks(count, prototypes, query.shape[1], query.dtype):
        scores = product(rows.normalized(query[part], normalize), keys.mT)  # [R, M] float32
        weights = scores if query.dtype == torch.float32 else scores.new_empty(scores.shape, dtype=query.dtype)
        block_n, block_m = block_of_scores(prototypes)
        with device_of(query):
            _softmax[(cdiv(scores.shape[0], block_n),)](
                scores, weights, beta, lse[part], scores.shape[0], prototypes, scale, block_n, block_m
            )
        torch.mm(weights, v, out=out[part])
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, memory: Memory
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by recomputation; results as of `retrieve_flash.backward`, with SPLIT = 1.

    Args:
        dout: [N, dv], contiguous.
        dlse: [N] or None.
        query, memory: as in `forward`.
    """
    keys, values, beta, scale, normalize = memory
    v = memory.read
    (count, d), prototypes = query.shape, keys.shape[0]
    dquery = query.new_empty(count, d)
    key_sums = torch.zeros_like(keys, dtype=torch.float32)
    value_sums = key_sums if values is None else torch.zeros_like(values, dtype=torch.float32)
    along_beta = None if beta is None else query.new_empty(count, dtype=torch.float32)
    for part in chunks(count, prototypes, d, query.dtype):
        unit = rows.normalized(query[part], normalize)  # [R, d]
        scores, dweights = product(unit, keys.mT), product(dout[part], v.mT)  # [R, M] float32
        in_place = query.dtype == torch.float32
        weights = scores if in_place else scores.new_empty(scores.shape, dtype=query.dtype)
        dscores = dweights if in_place else scores.new_empty(scores.shape, dtype=query.dtype)
        block_n, block_m = block_of_scores(prototypes)
        with device_of(query):
            _softmax_backward[(cdiv(scores.shape[0], block_n),)](
                scores, dweights, weights, dscores, beta, None if dlse is None else dlse[part],
                None if along_beta is None else along_beta[part], scores.shape[0], prototypes, scale, block_n, block_m,
            )  # fmt: skip
        rows.normalized_backward(product(dscores, keys)[None], query[part], normalize, dquery[part])
        add_product(key_sums, dscores.mT, unit)
        add_product(value_sums, weights.mT, dout[part])
    return (
        dquery,
        key_sums[None],
        None if values is None else value_sums[None],
        None if along_beta is None else along_beta.sum(),
    )


def chunks(count: int, prototypes: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the queries, in order, whose scratch takes about SCRATCH_BYTES and whose rows at most ROW_BYTES.

    Args:
        count: N.
        prototypes: M.
        width: d.
        dtype: of the queries.
    """
    scores = prototypes * (8 if dtype == torch.float32 else 12)  # bytes for each query
    row = width * (4 + dtype.itemsize)
    size = max(1, min(SCRATCH_BYTES // scores, ROW_BYTES // row) // 128) * 128
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def block_of_scores(prototypes: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_M) of the passes over the scratch: 2048 scores a block."""
    block_m = min(next_power_of_2(prototypes), 2048)
    return 2048 // block_m, block_m


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, [X, Y] · [Y, Z], without rounding the result to the operands' dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [X, Z] float32 += a b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += product(a, b)


def specs(architecture: int) -> Iterator[Spec]:
    """The passes over the scratch; the library multiplies the matrices."""
    for prototypes in (64, 4096):
        block_n, block_m = block_of_scores(prototypes)
        tile = Tile(rows=block_n, columns=block_m, warps=4, stages=3, shared=1)
        shape = {"BLOCK_N": block_n, "BLOCK_M": block_m, "beta": None}
        numbers = {"N": "i32", "M": "i32", "scale": "fp32"}
        yield spec(
            "retrieve_softmax bf16", _softmax, {"scores": "*fp32", "weights": "*bf16", "lse": "*fp32", **numbers},
            shape, tile, matrix=False,
        )  # fmt: skip
        yield spec(
            "retrieve_softmax_backward bf16", _softmax_backward,
            {
                "scores": "*fp32", "dweights": "*fp32", "weights": "*bf16", "dscores": "*bf16",
                "dlse": "*fp32", **numbers,
            },
            {"dbeta": None, **shape}, tile, matrix=False,
        )  # fmt: skip
