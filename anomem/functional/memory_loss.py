"""The losses of AnoMem: of one scale of stage 1, composed of the fused operators, and of stage 2; weights of scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anomem import reference
from anomem.functional._inputs import autocast_inputs, require_width
from anomem.functional.contrast import nt_xent
from anomem.functional.distributed import group_of, processes, require_counts
from anomem.functional.joint import joint_terms
from anomem.functional.retrieve import hopfield_retrieve
from anomem.functional.sampling import variance_hinge
from anomem.ops.library import accumulator
from anomem.reference import Negatives, Normalize, Weighting
from anomem.reference.contrast import NEGATIVES, WEIGHTINGS
from anomem.rules import Impl
from anomem.validation import (
    require,
    require_choice,
    require_count,
    require_mask,
    require_number,
    require_same_device,
    require_same_kind,
    require_tensor,
    shape_of,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from anomem.functional.distributed import Group


class ScaleVectors(NamedTuple):
    """The vectors of one scale and the memory that answers them; arguments of `contrasted_memory_loss`."""

    z: Tensor
    """[n, B, d]."""
    z_pair: Tensor
    """[n, B, d]."""
    prototypes: Tensor
    """[M, d]."""
    values: Tensor | None = None
    """[M, d]."""
    beta: float | Tensor | None = None
    steps: int = 1
    normalize: Normalize = "layer"
    shrink: float | Tensor = 0.0
    variance_gamma: float | Tensor = 1.0


def contrasted_memory_loss(
    z: Tensor,
    z_pair: Tensor,
    prototypes: Tensor,
    *,
    is_normal: Tensor | None = None,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    shrink: float | Tensor = 0.0,
    temperature: float | Tensor = 0.2,
    negatives: Negatives = "image",
    symmetric: bool = True,
    variance_gamma: float | Tensor = 1.0,
    distributed: bool = False,
    process_group: Group | None = None,
    counts: Sequence[int] | None = None,
    ring: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """L_COM and L_V of one scale (AnoMem Eqs. 2 to 4): means over the n sampled positions.

    L_COM is NT-Xent between one view's vectors and what the memory returns for the other's (for labelled anomalies:
    the other view itself). Both directions share one retrieval and one contrast: the views are stacked, so a scale
    costs two kernel launches each way whatever n is.

    Args:
        z: [n, B, d], sampled vectors of one view, B ≥ 2.
        z_pair: [n, B, d], the same positions of the other view.
        prototypes: [M, d].
        is_normal: [B] bool, y_k = 1; None when every image is normal.
        values: [M, d]; with beta, steps, normalize and shrink as in `hopfield_retrieve`.
        temperature: tau > 0.
        negatives: "image" (other images at the same position), "position" (other positions of the same image) or the
            sum of "both".
        symmetric: also contrast the second view with the memory's answer to the first, and take the mean.
        variance_gamma: target standard deviation of the variance term, as gamma of `variance_hinge`; 1 for raw,
            1/sqrt(d) for unit vectors.
        distributed: the batch is that of all processes: negatives and variance are the joint batch's, and the mean over
            the processes is its loss. See `nt_xent_distributed` for this and the next three.
        process_group: whose processes; torch.distributed's default group when None.
        counts: B of each process, where they differ.
        ring: where groups are not shared, let the columns travel instead of gathering them.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`. Parts for which the named one
            has no kernel choose by "auto".

    Returns:
        (L_COM, L_V), both 0-dim, float32 (float64 for float64).

    Raises:
        ArgumentError: a wrong shape, dtype or name, or fewer than two images.
    """
    scale = ScaleVectors(z, z_pair, prototypes, values, beta, steps, normalize, shrink, variance_gamma)
    return contrasted_memory_losses(
        [scale],
        is_normal=is_normal,
        temperature=temperature,
        negatives=negatives,
        symmetric=symmetric,
        distributed=distributed,
        process_group=process_group,
        counts=counts,
        ring=ring,
        impl=impl,
    )[0]


def contrasted_memory_losses(
    scales: Sequence[ScaleVectors],
    *,
    is_normal: Tensor | None = None,
    temperature: float | Tensor = 0.2,
    negatives: Negatives = "image",
    symmetric: bool = True,
    distributed: bool = False,
    process_group: Group | None = None,
    counts: Sequence[int] | None = None,
    ring: bool = False,
    impl: Impl = "auto",
) -> list[tuple[Tensor, Tensor]]:
    """`contrasted_memory_loss` of several scales of the same images.

    Across processes all scales share one message forward and one backward. Those with fewer groups than processes share
    another; in the ring the columns of each of these travel on their own, and their variances share a message.

    Args:
        scales: S scales, of the same B.
        is_normal: as in `contrasted_memory_loss`, and so are the others.
        temperature: tau > 0.
        negatives: "image", "position" or "both".
        symmetric: contrast both ways and take the mean.
        distributed: the batch is that of all processes.
        process_group: whose processes.
        counts: B of each process, where they differ.
        ring: where groups are not shared, let the columns travel instead of gathering them.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Returns:
        S times (L_COM, L_V), all 0-dim.

    Raises:
        ArgumentError: as `contrasted_memory_loss`.
    """
    require_choice(negatives, "negatives", NEGATIVES)
    group = group_of(process_group) if distributed else None
    world = processes(group) if distributed else 1
    scales = [_checked(scale, is_normal, world, counts) for scale in scales]
    if world == 1:  # one after another: what a scale has written is still in the cache when it is read
        return [
            _terms(scale, *_answered(scale, is_normal, symmetric, impl), temperature, negatives, symmetric, impl)
            for scale in scales
        ]
    pairs = [_answered(scale, is_normal, symmetric, impl) for scale in scales]
    return _joint_terms(scales, pairs, temperature, negatives, symmetric, group, counts, ring, impl)


def _checked(scale: ScaleVectors, is_normal: Tensor | None, world: int, counts: Sequence[int] | None) -> ScaleVectors:
    """The same, in autocast's dtype, after a look at every argument."""
    z, z_pair = scale.z, scale.z_pair
    require_tensor(z, "z", (3,), "[n, B, d]")
    require_tensor(z_pair, "z_pair", (3,), "[n, B, d]")
    require(z.shape == z_pair.shape, "z_pair", lambda: f"the shape of `z`, {shape_of(z)}", z_pair)
    z, z_pair = autocast_inputs(z, z_pair)
    require_same_kind(z_pair, "z_pair", z, "z")
    if scale.values is not None:
        require_width(scale.values, z.shape[-1])
    require(z.shape[0] > 0, "z", "at least one sampled position", z)
    images = sum(require_counts(counts, world)) if world > 1 and counts is not None else world * z.shape[1]
    require(z.shape[1] >= 1 or world > 1, "z", "at least one image", z)
    require(images >= 2, "z", "at least two images in the batch", z, "the contrast needs a negative")
    if is_normal is not None:
        require_mask(is_normal, "is_normal", z.shape[1])
        require_same_device(is_normal, "is_normal", z, "z")
    return scale._replace(z=z, z_pair=z_pair)


def _answered(scale: ScaleVectors, is_normal: Tensor | None, symmetric: bool, impl: Impl) -> tuple[Tensor, Tensor]:
    """The vectors to be contrasted, and what answers them: [n, B, d] each, or [2n, B, d] where both ways are.

    View v is contrasted with the memory's answer to the other view.
    """
    z, z_pair, prototypes, values, beta, steps, normalize, shrink, _ = scale
    views = torch.cat([z, z_pair]) if symmetric else z  # [n or 2n, B, d]
    queries = torch.cat([z_pair, z]) if symmetric else z_pair
    retrieved = hopfield_retrieve(
        queries, prototypes, values=values, beta=beta, steps=steps, normalize=normalize, shrink=shrink, impl=impl
    )
    if is_normal is not None:
        retrieved = torch.where(is_normal[:, None], retrieved, queries.to(retrieved.dtype))
    return views.to(retrieved.dtype), retrieved


def _terms(
    scale: ScaleVectors,
    views: Tensor,
    retrieved: Tensor,
    temperature: float | Tensor,
    negatives: Negatives,
    symmetric: bool,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """(L_COM, L_V) of a scale in one process."""
    loss = scale.z.new_zeros((), dtype=accumulator(scale.z))
    if negatives != "position":
        loss = loss + nt_xent(views, retrieved, temperature=temperature, impl=impl, part=True)
    if negatives != "image":
        loss = loss + _within_images(views, retrieved, temperature, symmetric, impl)
    return loss, variance_hinge(retrieved, gamma=scale.variance_gamma, impl=impl, part=True)


def _joint_terms(
    scales: Sequence[ScaleVectors],
    pairs: Sequence[tuple[Tensor, Tensor]],
    temperature: float | Tensor,
    negatives: Negatives,
    symmetric: bool,
    group: ProcessGroup | None,
    counts: Sequence[int] | None,
    ring: bool,
    impl: Impl,
) -> list[tuple[Tensor, Tensor]]:
    """(L_COM, L_V) of every scale across processes."""
    found = joint_terms(
        pairs,
        contrasted=negatives != "position",
        temperature=temperature,
        gammas=[scale.variance_gamma for scale in scales],
        group=group,
        counts=counts,
        ring=ring,
        impl=impl,
    )
    terms = []
    for scale, pair, (contrast, variance) in zip(scales, pairs, found, strict=True):
        loss = scale.z.new_zeros((), dtype=accumulator(scale.z)) if contrast is None else contrast
        if negatives != "image":
            # Nothing is exchanged. The mean over the processes is the mean over the images.
            images, world = scale.z.shape[1], processes(group)
            weight = 1.0 if counts is None else images * world / sum(counts)
            loss = loss + (weight * _within_images(*pair, temperature, symmetric, impl) if images else 0.0)
        terms.append((loss, variance))
    return terms


def _within_images(
    views: Tensor, retrieved: Tensor, temperature: float | Tensor, symmetric: bool, impl: Impl
) -> Tensor:
    """The contrast with other positions of the same image: 0-dim, the mean over the images."""
    ours, theirs = (_by_image(x, symmetric) for x in (views, retrieved))
    return nt_xent(ours, theirs, temperature=temperature, impl=impl, part=True)


def _by_image(x: Tensor, symmetric: bool) -> Tensor:
    """Group by image and direction instead of by position: [k·n, B, d] -> [k·B, n, d], k = 2 when symmetric."""
    directions = 2 if symmetric else 1
    split = x.reshape(directions, -1, *x.shape[1:])  # [k, n, B, d]
    return split.transpose(1, 2).flatten(0, 1)


def scale_weights(count: int, weighting: Weighting = "exp") -> tuple[float, ...]:
    """lambda_s of AnoMem Eq. 4 for s = 1 … S, increasing.

    Args:
        count: S ≥ 1, number of scales.
        weighting: "exp", 2^(s−S) (the default of the paper's table 7), or "linear", s/S.

    Returns:
        S numbers in (0, 1]; the last, of the coarsest scale, is 1.

    Raises:
        ArgumentError: no scale, or an unknown weighting.

    Example:
        >>> scale_weights(3)
        (0.25, 0.5, 1.0)
    """
    require_count(count, "count", 1)
    require_choice(weighting, "weighting", WEIGHTINGS)
    return reference.scale_weights(count, weighting)


def margin_loss(length: Tensor, is_normal: Tensor, margin: float | Tensor = 2.0) -> Tensor:
    """The margin loss of stage 2 at one scale: y max(0, |g| − 1/M) + (1 − y) max(0, M − |g|), mean over the batch.

    Args:
        length: [B], |g_k|, length of each image's embedding.
        is_normal: [B] bool, y_k = 1.
        margin: M ≥ 1, a number or a 0-dim tensor; normals end inside radius 1/M, anomalies outside M.

    Returns:
        0-dim, in length's dtype; differentiable.

    Raises:
        ArgumentError: a wrong shape, dtype, device or number.

    Example:
        >>> float(margin_loss(torch.tensor([0.5, 1.5]), torch.tensor([True, False])))
        0.25
    """
    require_tensor(length, "length", (1,), "[B]")
    require_mask(is_normal, "is_normal", length.shape[0])
    require_same_device(is_normal, "is_normal", length, "length")
    require_number(margin, "margin")
    require(isinstance(margin, Tensor) or margin >= 1, "margin", "a number ≥ 1", margin)
    return reference.margin_loss(length, is_normal, margin)
