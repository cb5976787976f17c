"""Retrieval by the library's products over chunks of queries, for any d, dv and M, and for exact float32.

Per chunk of R queries, with S, dP, P, dS of size [R, M] in a scratch:

    forward    S = norm(Q) Kᵀ;   P = softmax(b S), L = logsumexp(b S)   one Triton pass;   O = P V
    backward   float32   S = norm(Q) Kᵀ;   dP = dO Vᵀ;   P = softmax(b S), b dS = b P ∘ (dP − Σ_m P dP + dL)   one pass
               16 bits   P and b dS in one kernel, with both products, from the forward's normaliser and from delta
               dQ = (∂norm/∂Q)ᵀ b dS K;   dK += b dSᵀ norm(Q);   dV += Pᵀ dO

b = scale · beta. S and dP are float32 also for bfloat16 rows: 2⁻⁹ of a logit of 10 would be 2% of P. The backward of 16
bits never stores them: 12 bytes of a score go through memory, where passes over all four would move 26. It multiplies
dS by K less its mean, and adds dL times the mean, since a row of dS sums to dL: see `retrieve_flash`. The sums over
queries are cut into spans, so that a small memory fills the GPU. Chunks and spans are added in order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from anomem.kernels import rows
from anomem.kernels.launching import launch_kernel
from anomem.kernels.primitives import (
    LN2,
    Memory,
    add_library_product,
    cdiv,
    device_of,
    dot,
    load_normaliser,
    load_slice,
    multiprocessors,
    next_power_of_2,
    online_softmax,
    round_to,
    score_scale,
    scratch_bytes,
    sign_and_steepness,
    store_softmax_sums,
)
from anomem.kernels.tile_search import Launched, Site, launch
from anomem.kernels.tile_table import Entry, Tile

# Limit of norm(Q) and float32 dQ of one chunk together. Only a small memory with long rows reaches it: its scratch
# would have room for millions of queries.
ROW_BYTES = 128 * 2**20
# Features that one product of the weights' kernel takes.
BLOCK_D = 64
WEIGHTS: Entry = ("retrieve_chunked_weights", "half", BLOCK_D)


@triton.jit
def row_sums(scores, dweights, queries, N, M, sign, steepness, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """(shift, Σ_m E, Σ_m E dP) of whole rows, each [BLOCK_N], with E = exp2((sign S − shift) steepness).

    Without dweights (None) the third is zero.
    """
    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    weighted_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        offsets, mask = scratch_offsets(queries, start + tl.arange(0, BLOCK_M), N, M)
        score_tile = tl.load(scores + offsets, mask=mask, other=float("-inf"))  # [BLOCK_N, BLOCK_M]
        score_tile = tl.where(mask, score_tile * sign, float("-inf"))
        exponentials, running_max, running_sum, shift, rescale = online_softmax(
            score_tile, steepness, running_max, running_sum
        )
        if dweights is not None:
            dweight_tile = tl.load(dweights + offsets, mask=mask, other=0.0)
            weighted_sum = weighted_sum * rescale + tl.sum(exponentials * dweight_tile, axis=1)
    return shift, running_sum, weighted_sum


@triton.jit
def scratch_offsets(queries, prototypes, N, M):
    """Offsets and mask [BLOCK_N, BLOCK_M] in the scratch [N, M], which has far fewer than 2³¹ elements."""
    return queries[:, None] * M + prototypes[None, :], (queries < N)[:, None] & (prototypes < M)[None, :]


@triton.jit(do_not_specialize=["N"])
def retrieve_chunked_softmax_kernel(
    scores,  # [N, M] float32
    weights,  # [N, M]; for float32 the same memory as `scores`
    beta,  # 0-dim, or None
    lse,  # [N] float32
    normaliser,  # [N, 2] float32: see `store_softmax_sums`
    N,
    M,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """P and L of one chunk from its S. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    sign, steepness = sign_and_steepness(score_scale(beta, scale))
    shift, total, _ = row_sums(scores, None, queries, N, M, sign, steepness, BLOCK_N, BLOCK_M)
    for start in range(0, M, BLOCK_M):
        offsets, mask = scratch_offsets(queries, start + tl.arange(0, BLOCK_M), N, M)
        score_tile = tl.load(scores + offsets, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M]
        weight_tile = tl.exp2((score_tile * sign - shift[:, None]) * steepness) / total[:, None]
        tl.store(weights + offsets, round_to(weight_tile, weights.dtype.element_ty), mask=mask)
    store_softmax_sums(lse, normaliser, queries, N, shift, total, steepness)


@triton.jit(do_not_specialize=["N"])
def retrieve_chunked_softmax_backward_kernel(
    scores,  # [N, M] float32
    dweights,  # [N, M] float32
    weights,  # [N, M] float32, the same memory as `scores`
    dscores,  # [N, M] float32, the same memory as `dweights`
    beta,  # 0-dim, or None
    dlse,  # [N] float32, or None
    dbeta,  # [N] float32, Σ_m dS S of each row times scale; None without beta
    N,
    M,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """P, b dS and dbeta of one chunk from its S and dP. Grid: [tiles of queries]."""
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b = score_scale(beta, scale)
    sign, steepness = sign_and_steepness(b)
    # The flash scheme computes P from L and delta from O. Here whole rows are at hand, which is more exact: rounding an
    # L of 200 would cost 1e-5 of P, and the error of a rounded O in delta would add up in Σ_m dS.
    shift, total, weighted_sum = row_sums(scores, dweights, queries, N, M, sign, steepness, BLOCK_N, BLOCK_M)
    delta = weighted_sum / total  # [BLOCK_N], Σ_m P dP
    slope = tl.zeros((BLOCK_N,), tl.float32)
    if dlse is not None:
        slope += tl.load(dlse + queries, mask=queries < N, other=0.0)
    dbeta_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, M, BLOCK_M):
        offsets, mask = scratch_offsets(queries, start + tl.arange(0, BLOCK_M), N, M)
        score_tile = tl.load(scores + offsets, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M], without b
        dweight_tile = tl.load(dweights + offsets, mask=mask, other=0.0)
        weight_tile = tl.exp2((score_tile * sign - shift[:, None]) * steepness) / total[:, None]
        # Where one weight is 1 the difference is 0, and what is left is dL.
        dscore_tile = weight_tile * ((dweight_tile - delta[:, None]) + slope[:, None])
        if beta is not None:
            dbeta_sum += tl.sum(tl.where(mask, dscore_tile * score_tile, 0.0), axis=1)
        tl.store(weights + offsets, weight_tile, mask=mask)
        tl.store(dscores + offsets, dscore_tile * b, mask=mask)
    if beta is not None:
        tl.store(dbeta + queries, dbeta_sum * scale, mask=queries < N)


@triton.jit(do_not_specialize=["N", "M"])
def retrieve_chunked_weights_kernel(
    query,  # [N, d], already normalised
    keys,  # [M, d]
    values,  # [M, dv]; the keys themselves when tied
    dout,  # [N, dv]
    normaliser,  # [N, 2] float32, from the forward
    delta,  # [N] float32
    weights,  # [N, M], P
    dscores,  # [N, M], b dS
    beta,  # 0-dim, or None
    dlse,  # [N] float32, or None
    dbeta,  # [tiles] float32, partial sums; None without beta
    N,
    M,
    query_stride,
    scale,
    TIED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of P and b dS, both products summed over slices of features. Grid: [tiles], prototypes fastest."""
    tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) % tiles
    queries = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    prototypes = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    b = score_scale(beta, scale)
    sign, steepness = sign_and_steepness(b)
    scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # S / b
    dweights = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # dP
    for begin in range(0, D, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        query_slice = load_slice(query, queries, columns, query_stride, N, D)  # [BLOCK_N, BLOCK_D]
        key_slice = load_slice(keys, prototypes, columns, D, M, D)  # [BLOCK_M, BLOCK_D]
        scores = dot(query_slice, tl.trans(key_slice), scores, "ieee")
        if TIED:
            dout_slice = load_slice(dout, queries, columns, DV, N, DV)  # [BLOCK_N, BLOCK_D]
            dweights = dot(dout_slice, tl.trans(key_slice), dweights, "ieee")
    if not TIED:
        for begin in range(0, DV, BLOCK_D):
            columns = begin + tl.arange(0, BLOCK_D)
            dout_slice = load_slice(dout, queries, columns, DV, N, DV)
            value_slice = load_slice(values, prototypes, columns, DV, M, DV)  # [BLOCK_M, BLOCK_D]
            dweights = dot(dout_slice, tl.trans(value_slice), dweights, "ieee")
    shift, log_total = load_normaliser(normaliser, queries, N)  # [BLOCK_N]
    row_delta = tl.load(delta + queries, mask=queries < N, other=0.0)
    offsets, mask = scratch_offsets(queries, prototypes, N, M)
    weight_tile = tl.exp2((scores * sign - shift[:, None]) * steepness - log_total[:, None])  # [BLOCK_N, BLOCK_M]
    dscore_tile = tl.where(mask, weight_tile * (dweights - row_delta[:, None]), 0.0)
    tl.store(weights + offsets, round_to(weight_tile, weights.dtype.element_ty), mask=mask)
    tl.store(dscores + offsets, round_to(dscore_tile * b, dscores.dtype.element_ty), mask=mask)
    if beta is not None:
        # As in `retrieve_flash_query_gradient_kernel`: no difference of large numbers where one weight is almost 1.
        centre = tl.where(b == 0.0, 0.0, sign * shift + log_total * LN2 / b)
        part = tl.sum(dscore_tile * (scores - centre[:, None]), axis=1)
        if dlse is not None:
            part += tl.where(tile == 0, centre * tl.load(dlse + queries, mask=queries < N, other=0.0), 0.0)
        part = tl.where(queries < N, part, 0.0)  # outside, the logarithm is inf
        tl.store(dbeta + tl.program_id(0), tl.sum(part, axis=0) * scale)


def forward(query: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
    """out [N, dv], lse [N] and normaliser [N, 2]; arguments as in `retrieve_flash.forward`."""
    keys, _, beta, scale, normalize = memory
    values = memory.read_values
    count, prototypes = query.shape[0], keys.shape[0]
    out = query.new_empty(count, values.shape[1])
    lse, normaliser = (query.new_empty(count, *width, dtype=torch.float32) for width in ((), (2,)))
    block_n, block_m = block_of_scores(prototypes)
    for chunk in chunks(count, prototypes, query.shape[1], query.dtype, query.device):
        scores = product(rows.normalized(query[chunk], normalize), keys.mT)  # [R, M] float32
        weights = scores if query.dtype == torch.float32 else scores.new_empty(scores.shape, dtype=query.dtype)
        with device_of(query):
            launch_kernel(retrieve_chunked_softmax_kernel, (cdiv(scores.shape[0], block_n),),
                scores, weights, beta, lse[chunk], normaliser[chunk],
                scores.shape[0], prototypes, scale, block_n, block_m,
            )  # fmt: skip
        torch.mm(weights, values, out=out[chunk])
        del scores, weights  # before the next chunk takes its scratch
    return out, lse, normaliser


def backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, memory: Memory, out: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by recomputation; results as of `retrieve_flash.backward`.

    Args:
        dout: [N, dv], contiguous.
        dlse: [N] or None.
        query, memory: as in `forward`.
        out, normaliser: the results of `forward`.
    """
    if query.dtype == torch.float32:
        weights_of: Weights = Softmaxes(dlse, query, memory)
    else:
        weights_of = Tiles(dout, dlse, query, memory, out, normaliser)
    (count, d), normalize = query.shape, memory.normalize
    dv = dout.shape[1]
    dquery = query.new_empty(count, d)
    parts = spans(memory.keys.shape[0], d, query)
    key_sums = value_sums = None
    for chunk in chunks(count, memory.keys.shape[0], d, query.dtype, query.device):
        unit, slope = whole_vectors(rows.normalized(query[chunk], normalize)), whole_vectors(dout[chunk])
        weights, dscores = weights_of(chunk, unit, slope)
        gradient = weights_of.unit_gradient(chunk, dscores)[None, :, :d].contiguous()
        rows.normalized_backward(gradient, query[chunk], normalize, dquery[chunk])
        key_sums = add_products(key_sums, dscores, unit, parts)
        if memory.values is None:
            key_sums = add_products(key_sums, weights, slope, parts)
        else:
            value_sums = add_products(value_sums, weights, slope, parts)
        del unit, slope, weights, dscores, gradient  # before the next chunk takes its scratch
    assert key_sums is not None
    value_sums = None if value_sums is None else value_sums[..., :dv].contiguous()
    return dquery, key_sums[..., :d].contiguous(), value_sums, weights_of.dbeta


def whole_vectors(x: Tensor) -> Tensor:
    """16-bit rows [X, d] with zeros up to the next 16 bytes: loads and the library's products take them as vectors."""
    if x.dtype == torch.float32 or x.shape[1] % 8 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))


class Softmaxes:
    """P and b dS of chunks from the library's S and dP, by a pass over whole rows; float32.

    Args: as of `backward`.
    """

    def __init__(self, dlse: Tensor | None, query: Tensor, memory: Memory) -> None:
        self._dlse, self._memory = dlse, memory
        self._dbeta = None if memory.beta is None else query.new_empty(query.shape[0], dtype=torch.float32)

    def __call__(self, chunk: slice, unit: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """(P, b dS) [R, M] of these queries; unit: [R, d], normalised; dout: [R, dv]."""
        keys, _, beta, scale, _ = self._memory
        scores, dweights = product(unit, keys.mT), product(dout, self._memory.read_values.mT)
        block_n, block_m = block_of_scores(keys.shape[0])
        with device_of(unit):
            launch_kernel(retrieve_chunked_softmax_backward_kernel, (cdiv(scores.shape[0], block_n),),
                scores, dweights, scores, dweights, beta,
                None if self._dlse is None else self._dlse[chunk], None if self._dbeta is None else self._dbeta[chunk],
                scores.shape[0], keys.shape[0], scale, block_n, block_m,
            )  # fmt: skip
        return scores, dweights

    def unit_gradient(self, chunk: slice, dscores: Tensor) -> Tensor:
        """b dS K [R, d] float32."""
        return product(dscores, self._memory.keys)

    @property
    def dbeta(self) -> Tensor | None:
        """0-dim, after all chunks; None without beta."""
        return None if self._dbeta is None else self._dbeta.sum()


class Tiles:
    """P and b dS of chunks by one kernel, with its products; 16 bits.

    Args: as of `backward`.
    """

    def __init__(
        self, dout: Tensor, dlse: Tensor | None, query: Tensor, memory: Memory, out: Tensor, normaliser: Tensor
    ) -> None:
        self._dlse, self._beta, self._scale, self._normaliser = dlse, memory.beta, memory.scale, normaliser
        self._delta = rows.row_constant(out, dout, dlse)
        self._keys = whole_vectors(memory.keys)
        self._values = None if memory.values is None else whole_vectors(memory.values)
        self._mean = self._keys.mean(0, dtype=torch.float32)  # [d]
        self._centred = (self._keys - self._mean).to(query.dtype)  # [M, d]
        self._dbeta: list[Tensor] = []

    def __call__(self, chunk: slice, unit: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """(P, b dS) [R, M] of these queries; unit: [R, d], normalised; dout: [R, dv]; both of whole vectors."""
        keys, values, beta, scale = self._keys, self._values, self._beta, self._scale
        count, prototypes = unit.shape[0], keys.shape[0]
        dlse = None if self._dlse is None else self._dlse[chunk]
        weights, dscores = (unit.new_empty(count, prototypes) for _ in range(2))

        def run(tile: Tile) -> Launched:
            tiles = cdiv(count, tile.rows) * cdiv(prototypes, tile.columns)
            dbeta = None if beta is None else unit.new_empty(tiles, dtype=torch.float32)
            compiled = launch_kernel(retrieve_chunked_weights_kernel, (tiles,),
                unit, keys, keys if values is None else values, dout, self._normaliser[chunk], self._delta[chunk],
                weights, dscores, beta, dlse, dbeta, count, prototypes, unit.stride(0), scale,
                TIED=values is None, D=unit.shape[1], DV=dout.shape[1],
                BLOCK_N=tile.rows, BLOCK_M=tile.columns, BLOCK_D=BLOCK_D, **tile.options,
            )  # fmt: skip
            return Launched(compiled, dbeta)

        facts = {"dtype": unit.dtype, "d": unit.shape[1], "dv": dout.shape[1], "tied": values is None}
        facts |= {"beta": beta is not None, "dlse": dlse is not None}
        with device_of(unit):
            dbeta = launch(Site(WEIGHTS, facts, count, prototypes, unit.device), run)
        if dbeta is not None:
            self._dbeta.append(dbeta.sum())
        return weights, dscores

    def unit_gradient(self, chunk: slice, dscores: Tensor) -> Tensor:
        """b dS K [R, d] float32."""
        gradient = product(dscores, self._centred)
        if self._dlse is not None:
            slopes = self._dlse[chunk] * self._scale
            gradient.addr_(slopes if self._beta is None else slopes * self._beta, self._mean)
        return gradient

    @property
    def dbeta(self) -> Tensor | None:
        """0-dim, after all chunks; None without beta."""
        return torch.stack(self._dbeta).sum() if self._dbeta else None


Weights = Softmaxes | Tiles


def chunks(count: int, prototypes: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Slices of the queries, in order, whose scratch takes about SCRATCH_BYTES and whose rows at most ROW_BYTES.

    Args:
        count: N.
        prototypes: M.
        width: d.
        dtype: of the queries.
        device: of the queries.
    """
    # float32 has S and dP, which become P and dS. 16 bits have P and dS, and S and P in the forward.
    scratch_per_query = prototypes * (8 if dtype == torch.float32 else 6)  # bytes
    row_bytes = width * (4 + dtype.itemsize)
    size = max(1, min(scratch_bytes(device) // scratch_per_query, ROW_BYTES // row_bytes) // 128) * 128
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def block_of_scores(prototypes: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_M) of the passes over the scratch: 2048 scores a block."""
    block_m = min(next_power_of_2(prototypes), 2048)
    return 2048 // block_m, block_m


def spans(prototypes: int, width: int, like: Tensor) -> int:
    """Into how many spans of queries a sum [M, d] over them is cut: up to two tiles of 128 × 128 a multiprocessor."""
    return max(1, min(16, 2 * multiprocessors(like) // (cdiv(prototypes, 128) * cdiv(width, 128))))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, [X, Y] · [Y, Z], without rounding the result to the operands' dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def add_products(totals: Tensor | None, a: Tensor, b: Tensor, parts: int) -> Tensor:
    """totals [parts, Y, Z] float32 + aᵀ b of as many spans of rows; rows that are left over go to the first.

    Args:
        totals: changed in place; None for zeros.
        a: [X, Y], contiguous.
        b: [X, Z], contiguous.
        parts: number of spans.
    """
    span = a.shape[0] // parts
    left, right = (x[: parts * span].view(parts, span, x.shape[1]) for x in (a, b))
    totals = add_library_product(totals, left.mT, right)
    if parts * span < a.shape[0]:
        totals[0] += product(a[parts * span :].mT, b[parts * span :])
    return totals
