"""The deviation D(s) = Z(s) − HF(Z(s)), as vectors for detectors and as a map of distances for scoring."""

from __future__ import annotations

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import kernel_memory, memory_inputs, reference_memory, require_width, without_autocast
from anomem.functional.retrieve import hopfield_retrieve
from anomem.ops.library import accumulator
from anomem.reference import Distance, Normalize, normalize_rows
from anomem.reference.deviation_map import DISTANCES
from anomem.rules import Impl
from anomem.validation import require, require_choice, require_count, require_same_device, require_tensor


def deviation(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    shrink: float | Tensor = 0.0,
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
    require_tensor(query, "query", (), "[..., d]")
    if values is not None:
        require_width(values, query.shape[-1])
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
    return normalize_rows(query.to(accumulator(query)), normalize).to(retrieved.dtype) - retrieved


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
    part: bool = False,
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
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        [B, H, W], float32 (float64 for float64).

    Raises:
        ArgumentError: a wrong shape, dtype, device, name or number, or an implementation that cannot run here.

    Example:
        >>> deviation_map(torch.randn(2, 16, 7, 5), torch.randn(8, 16)).shape
        torch.Size([2, 7, 5])
    """
    require_tensor(feature_map, "feature_map", (4,), "[B, d, H, W]")
    require_choice(distance, "distance", DISTANCES)
    require_count(steps, "steps", 1)
    batch, features, height, width = feature_map.shape
    feature_map, memory = memory_inputs(
        feature_map.detach(), "feature_map", features, prototypes, values, beta, normalize
    )
    if values is not None:
        require_width(values, features)
    count = prototypes.shape[0]
    if log_prior is not None:
        require_tensor(log_prior, "log_prior", (2,), "[H·W, M]")
        right = tuple(log_prior.shape) == (height * width, count)
        require(right, "log_prior", lambda: f"[{height * width}, {count}]", log_prior)
        require_same_device(log_prior, "log_prior", feature_map, "feature_map")
    problem = rules.problem_of(
        "deviation_map",
        feature_map,
        prototypes,
        features=features,
        rows=batch * height * width,
        columns=count,
        steps=steps,
    )
    chosen = backends.choose(problem, impl, part=part)
    dtype = accumulator(feature_map)
    with torch.no_grad(), without_autocast(feature_map.device.type):
        if chosen == "reference":
            return reference.deviation_map(
                feature_map.to(dtype),
                **reference_memory(memory, dtype),
                steps=steps,
                kind=distance,
                log_prior=log_prior,
            )
        from anomem.ops import deviation_map as operators

        prior = None if log_prior is None else log_prior.to(dtype).contiguous()
        return operators.deviation_map(feature_map, kernel_memory(memory), distance, prior)
