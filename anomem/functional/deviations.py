"""The deviation D(s) = Z(s) − HF(Z(s)), as vectors for detectors and as a map of distances for scoring."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import backends
from anomem.backends import Impl
from anomem.functional.precision import accumulator, autocast_inputs, scalar, without_autocast
from anomem.functional.retrieval import hopfield_retrieve
from anomem.reference.deviation import Distance
from anomem.reference.deviation import deviation_map as reference_map
from anomem.reference.normalize import Normalize, normalize_rows
from anomem.validation import (
    DISTANCES,
    NORMALIZE,
    require,
    require_choice,
    require_count,
    require_number,
    require_same_kind,
    require_tensor,
    shape_of,
)


def deviation(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    shrink: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """norm(q) − HF(q): how a feature differs from what the memory gives back, in the memory's own space.

    Args:
        query: [..., d].
        prototypes: [M, d]; the other arguments as in `hopfield_retrieve`, with `values` of width d.

    Returns:
        [..., d] in query's dtype; differentiable.

    Raises:
        ArgumentError: as `hopfield_retrieve`.
    """
    if isinstance(values, Tensor) and isinstance(query, Tensor):
        require(values.shape[-1] == query.shape[-1], "values", lambda: f"[M, {query.shape[-1]}]", values)
    retrieved = hopfield_retrieve(
        query,
        prototypes,
        values=values,
        beta=beta,
        steps=steps,
        normalize=normalize,
        shrink=shrink,
        impl=impl,
    )
    return normalize_rows(query, normalize).to(retrieved.dtype) - retrieved


def deviation_map(
    feature_map: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    distance: Distance = "cosine",
    log_prior: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Distance between feature and retrieval at every position of a map; inference only, no gradient.

    The native implementation writes neither the transposed features nor the retrieved vectors.

    Args:
        feature_map: [B, d, H, W], NCHW or channels-last.
        prototypes: [M, d].
        values: [M, d], read instead of the normalised prototypes.
        beta: as in `hopfield_retrieve`.
        steps: as in `hopfield_retrieve`; more than one runs the reference.
        normalize: as in `hopfield_retrieve`.
        distance: "cosine" (1 − cos, 0 to 2) or "l2".
        log_prior: [H·W, M], `log pi(prototype | position)` added to the logits (location prior).
        impl: which implementation; see the package.

    Returns:
        [B, H, W], float32 (float64 for float64).

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.
    """
    require_tensor(feature_map, "feature_map", (4,), "[B, d, H, W]")
    require_tensor(prototypes, "prototypes", (2,), "[M, d]")
    features = feature_map.shape[1]
    require(features > 0, "feature_map", "[B, d, H, W] with d ≥ 1", feature_map)
    right_shape = prototypes.shape[1] == features and prototypes.shape[0] > 0
    require(right_shape, "prototypes", lambda: f"[M, {features}] with M ≥ 1", prototypes)
    require_choice(normalize, "normalize", NORMALIZE)
    require_choice(distance, "distance", DISTANCES)
    require_count(steps, "steps", 1)
    if beta is not None:
        require_number(beta, "beta")
    feature_map, prototypes, values = autocast_inputs(feature_map.detach(), prototypes, values)
    require_same_kind(prototypes, "prototypes", feature_map, "feature_map")
    if values is not None:
        require_tensor(values, "values", (2,), "[M, d]")
        require_same_kind(values, "values", feature_map, "feature_map")
        require(values.shape == prototypes.shape, "values", lambda: shape_of(prototypes), values)
    batch, _, height, width = feature_map.shape
    if log_prior is not None:
        require_tensor(log_prior, "log_prior", (2,), "[H·W, M]")
        wanted = (height * width, prototypes.shape[0])
        require(tuple(log_prior.shape) == wanted, "log_prior", lambda: f"[{wanted[0]}, {wanted[1]}]", log_prior)
    if beta is None:
        beta = features**-0.5
    problem = backends.Problem(
        "deviation_map",
        feature_map.device.type,
        feature_map.dtype,
        features,
        rows=batch * height * width,
        columns=prototypes.shape[0],
    )
    if steps > 1 and impl == "auto":
        impl = "reference"
    require(steps == 1 or impl == "reference", "steps", lambda: f"1 for impl={impl!r}", steps, 'use impl="reference"')
    chosen = backends.choose(problem, impl)
    dtype = accumulator(feature_map)
    with torch.no_grad(), without_autocast(feature_map.device.type):
        if chosen == "reference":
            return reference_map(
                feature_map.to(dtype),
                prototypes.to(dtype),
                values=None if values is None else values.to(dtype),
                beta=beta,
                steps=steps,
                normalize=normalize,
                kind=distance,
                log_prior=log_prior,
            )
        from anomem.ops import inference

        learned, scale = scalar(beta, feature_map)
        return inference.deviation_map(
            feature_map,
            prototypes.detach().contiguous(),
            None if values is None else values.detach().contiguous(),
            learned,
            scale,
            normalize,
            distance,
            None if log_prior is None else log_prior.to(dtype).contiguous(),
        )
