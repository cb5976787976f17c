"""What is computed: retrieval and its relatives, sampling, the loss of a scale; `OPERATORS` has all by name.

Flops of retrieval. S = q Kᵀ and P V are 2·N·M·d each: 4·N·M·d forward. The backward pass needs dP = dO Vᵀ, dq = dS K,
and the memory's gradient dSᵀ q and Pᵀ dO: 8·N·M·d if P was kept, 10·N·M·d if it is recomputed. The floor counts
12·N·M·d for both passes: a kernel that keeps nothing of size [N, M] does 14 and reaches at most 86 % of the floor.

Gather, variance, batch norm and augmentation have no matrix product: bytes alone make their floor. The strided
convolutions have both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import functional as AF
from anomem.testing import draw
from benchmarks.harness.case import Dims, Function, Operator, Work, capped
from benchmarks.operators_augment import AUGMENT
from benchmarks.operators_contrast import INFO_NCE, NT_XENT, nt_xent_work, view_pair


def query_and_prototypes(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Queries [N, d] and prototypes [M, d]."""
    query = draw(dims["N"], dims["d"], dtype=dtype, seed=seed)
    return query, draw(dims["M"], dims["d"], dtype=dtype, seed=seed + 1)


def retrieve(impl: str) -> Function:
    """The library's retrieval."""
    return lambda query, prototypes: AF.hopfield_retrieve(query, prototypes, impl=impl)


def shrink(impl: str) -> Function:
    """The library's retrieval with MemAE's shrinkage at 1/M, the low end of what MemAE recommends."""
    return lambda query, prototypes: AF.hopfield_retrieve(query, prototypes, shrink=1 / prototypes.shape[0], impl=impl)


def usage(impl: str) -> Function:
    """Mean retrieval weight of each prototype; computes all figures of `memory_diagnostics`."""
    return lambda query, prototypes: AF.memory_diagnostics(query, prototypes, impl=impl).mass


def retrieve_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """See the file's head; one exponential for each query and prototype."""
    N, M, d = dims["N"], dims["M"], dims["d"]
    moved = 2 * N * d + M * d  # q, K are read; O written
    if training:
        moved += 4 * N * d + 2 * M * d  # q, K, O, dO are read; dq, dK written
    return Work((12 if training else 4) * N * M * d, moved * itemsize, N * M)


def weights(dims: Dims) -> int:
    """The weights [N, M]."""
    return dims["N"] * dims["M"]


def fewer_queries(dims: Dims) -> Dims:
    """Fewer queries; an odd number, so that the last tile is not full."""
    # B images with equally many queries each: odd if B is odd or absent.
    images = dims.get("B", 1)
    return capped(dims, N=max(1, 2047 // images) * images)


def map_and_prototypes(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A map [B, d, H, H] and prototypes [M, d]."""
    feature_map = draw(dims["B"], dims["d"], dims["H"], dims["H"], dtype=dtype, seed=seed)
    return feature_map, draw(dims["M"], dims["d"], dtype=dtype, seed=seed + 1)


def deviation_map(impl: str) -> Function:
    """The library's deviation map, cosine distance."""
    return lambda feature_map, prototypes: AF.deviation_map(feature_map, prototypes, impl=impl)


def deviation_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """4·N·M·d flops with N = B·H²; map and memory are read, one float32 a position is written."""
    N, M, d = dims["B"] * dims["H"] ** 2, dims["M"], dims["d"]
    return Work(4 * N * M * d, (N * d + M * d) * itemsize + 4 * N, N * M)


def map_and_positions(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A map [B, C, H, H] and n distinct positions [n] int64."""
    B, C, H, n = (dims[name] for name in ("B", "C", "H", "n"))
    generator = torch.Generator().manual_seed(seed)
    return draw(B, C, H, H, dtype=dtype, seed=seed), torch.randperm(H * H, generator=generator)[:n]


def gather(impl: str) -> Function:
    """The library's gather with L2 normalisation."""
    return lambda feature_map, positions: AF.gather_positions(feature_map, positions, normalize=True, impl=impl)


def sampled(dims: Dims) -> int:
    """The sampled vectors [n, B, C]."""
    return dims["n"] * dims["B"] * dims["C"]


def whole_map(dims: Dims) -> int:
    """The map [B, C, H, H]."""
    return dims["B"] * dims["C"] * dims["H"] ** 2


def gather_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Forward reads and writes n·B·C elements; backward reads gradient and result and writes the whole map."""
    backward = 2 * sampled(dims) + whole_map(dims) if training else 0
    return Work(0, (2 * sampled(dims) + backward) * itemsize)


def grouped_rows(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """x [G, B, d], of standard deviation 0.9 so that the hinge is active in most coordinates."""
    return (draw(dims["G"], dims["B"], dims["d"], dtype=dtype, seed=seed, scale=0.9),)


def variance(impl: str) -> Function:
    """The library's variance hinge, mean over groups."""
    return lambda x: AF.variance_hinge(x, impl=impl)


def row_elements(dims: Dims) -> int:
    """x [G, B, d]."""
    return dims["G"] * dims["B"] * dims["d"]


def variance_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Forward reads x; backward reads x and writes its gradient."""
    return Work(0, row_elements(dims) * itemsize * (3 if training else 1))


def maps_and_numbers(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Two channels-last maps [B, C, H, H], and weight and bias [C] in float32."""
    shape = dims["B"], dims["C"], dims["H"], dims["H"]
    maps = (draw(*shape, dtype=dtype, seed=seed + i).contiguous(memory_format=torch.channels_last) for i in range(2))
    return (*maps, draw(dims["C"], seed=seed + 2), draw(dims["C"], seed=seed + 3))


def batch_norm(impl: str) -> Function:
    """Batch norm of the first map, plus the second, through a ReLU: the end of a residual block."""
    return lambda x, add, weight, bias: AF.batch_norm(x, None, None, weight, bias, True, add=add, relu=True, impl=impl)


def batch_norm_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Forward reads both maps and writes one; backward reads gradient, map and result and writes two gradients."""
    return Work(0, whole_map(dims) * itemsize * (8 if training else 3))


def map_and_weights(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A channels-last map [B, C, H, H], weights [K, C, 3, 3] and [K, C, 1, 1]."""
    B, C, H, K = (dims[name] for name in ("B", "C", "H", "K"))
    shapes = (B, C, H, H), (K, C, 3, 3), (K, C, 1, 1)
    feature_map, weight, shortcut = (draw(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes))
    layout = torch.channels_last
    return feature_map.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), shortcut


def downsample(impl: str) -> Function:
    """The sum of both convolutions: one gradient reaches both."""

    def total(x: Tensor, weight: Tensor, shortcut: Tensor) -> Tensor:
        branch, straight = AF.downsample(x, weight, shortcut, impl=impl)
        return branch + straight

    return total


def downsample_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Ten products for each pixel of the result; backward twice as many. The map is read, the result written; backward
    reads both again and writes the map's gradient."""
    side, channels = (dims["H"] + 1) // 2, dims["K"]
    results = dims["B"] * channels * side**2
    moved = whole_map(dims) * (3 if training else 1) + results * (2 if training else 1)
    return Work(20 * results * dims["C"] * (3 if training else 1), moved * itemsize)


def map_and_taps(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A channels-last map [B, C, H, H] and a weight [K, C, 3, 3]."""
    feature_map, weight, _ = map_and_weights(dims, dtype, seed)
    return feature_map, weight


def conv3x3(impl: str) -> Function:
    """The 3×3 convolution of stride 1."""
    return lambda x, weight: AF.conv3x3(x, weight, impl=impl)


def conv3x3_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Four products for each pixel of the result, by F(2×2, 3×3), where a direct convolution has nine; backward twice
    as many. The map is read, the result written; backward reads both again and writes the map's gradient."""
    results = dims["B"] * dims["K"] * dims["H"] ** 2
    moved = whole_map(dims) * (3 if training else 1) + results * (2 if training else 1)
    return Work(8 * results * dims["C"] * (3 if training else 1), moved * itemsize)


def sample(impl: str) -> Function:
    """Gather with L2 normalisation, then the variance hinge of the sampled vectors."""
    return lambda feature_map, positions: AF.variance_hinge(gather(impl)(feature_map, positions), impl=impl)


def sample_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Forward reads n·B·C elements; backward reads them again and writes the whole map."""
    backward = sampled(dims) + whole_map(dims) if training else 0
    return Work(0, (sampled(dims) + backward) * itemsize)


def views_and_prototypes(dims: Dims, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Two views [n, B, d] and prototypes [M, d]."""
    views = view_pair({**dims, "G": dims["n"]}, dtype, seed)
    return (*views, draw(dims["M"], dims["d"], dtype=dtype, seed=seed + 2))


def memory_loss(impl: str) -> Function:
    """The library's loss of one scale, symmetric, with the default weights."""

    def loss(z: Tensor, z_pair: Tensor, prototypes: Tensor) -> Tensor:
        contrasted, variance = AF.contrasted_memory_loss(z, z_pair, prototypes, impl=impl)
        return contrasted + 0.05 * variance

    return loss


def memory_loss_work(dims: Dims, itemsize: int, training: bool) -> Work:
    """Two retrievals, two NT-Xent losses, two hinges. Bytes are added up; a fusion across them could move less."""
    groups = {"G": dims["n"], "B": dims["B"], "d": dims["d"]}
    parts = (
        retrieve_work({"N": dims["n"] * dims["B"], "M": dims["M"], "d": dims["d"]}, itemsize, training),
        nt_xent_work(groups, itemsize, training),
        variance_work(groups, itemsize, training),
    )
    return Work(
        2 * sum(part.flops for part in parts),
        2 * sum(part.bytes for part in parts),
        2 * sum(part.exponentials for part in parts),
    )


_ALL = (
    Operator(
        "retrieve",
        "softmax(β LN(q) LN(K)ᵀ) LN(K)",
        query_and_prototypes,
        retrieve,
        retrieve_work,
        weights,
        fewer_queries,
    ),
    Operator(
        "shrink", "retrieval with hard shrinkage", query_and_prototypes, shrink, retrieve_work, weights, fewer_queries
    ),
    NT_XENT,
    INFO_NCE,
    Operator(
        "gather",
        "n positions of a map, L2-normalised",
        map_and_positions,
        gather,
        gather_work,
        sampled,
        lambda dims: capped(dims, B=64),
        width="C",
    ),
    Operator(
        "variance",
        "hinge on the standard deviation",
        grouped_rows,
        variance,
        variance_work,
        row_elements,
        lambda dims: capped(dims, G=8),
    ),
    Operator(
        "batch_norm",
        "max(0, batch norm + sum)",
        maps_and_numbers,
        batch_norm,
        batch_norm_work,
        whole_map,
        lambda dims: capped(dims, B=8),
        width="C",
    ),
    Operator(
        "downsample",
        "conv 3×3 + conv 1×1, both of stride 2",
        map_and_weights,
        downsample,
        downsample_work,
        whole_map,
        lambda dims: capped(dims, B=8),
        width="C",
    ),
    Operator(
        "conv3x3",
        "conv 3×3 of stride 1",
        map_and_taps,
        conv3x3,
        conv3x3_work,
        whole_map,
        lambda dims: capped(dims, B=8),
        width="C",
    ),
    Operator(
        "sample",
        "n positions of a map, L2-normalised, and the hinge on their standard deviation",
        map_and_positions,
        sample,
        sample_work,
        sampled,
        lambda dims: capped(dims, B=64),
        width="C",
        parts=("gather", "variance"),
    ),
    Operator(
        "deviation_map",
        "1 − cos(z, HF(z)) at every position",
        map_and_prototypes,
        deviation_map,
        deviation_work,
        lambda dims: dims["B"] * dims["H"] ** 2 * dims["M"],
        lambda dims: capped(dims, B=5),
    ),
    Operator(
        "usage", "usage and entropy of a memory", query_and_prototypes, usage, retrieve_work, weights, fewer_queries
    ),
    Operator(
        "memory_loss",
        "L_COM + 0.05 L_V of one scale, the bracket of Eq. (4)",
        views_and_prototypes,
        memory_loss,
        memory_loss_work,
        lambda dims: 2 * dims["n"] * ((2 * dims["B"]) ** 2 + dims["B"] * dims["M"]),
        lambda dims: capped(dims, n=2, B=255),
        parts=("nt_xent", "retrieve", "variance"),
    ),
    AUGMENT,
)
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ALL}
