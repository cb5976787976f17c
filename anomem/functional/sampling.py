"""Gather of sampled positions and the variance hinge."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from anomem import backends, reference
from anomem.backends import Impl
from anomem.functional._inputs import numbers
from anomem.ops.library import accumulator
from anomem.validation import (
    require,
    require_choice,
    require_index,
    require_schedule,
    require_tensor,
)


def gather_positions(
    feature_map: Tensor,
    positions: Tensor,
    *,
    normalize: bool = False,
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """The vectors of a feature map at sampled positions, one group per position (Algorithm 1, line 3).

    Args:
        feature_map: [B, C, H, W], NCHW or channels-last.
        positions: [n] int64 flat indices h·W + w for all images, or [B, n] for each image. Repeated positions are
            allowed; their gradients add up.
        normalize: L2-normalise each vector in the same pass.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        [n, B, C] in the map's dtype.

    Raises:
        ArgumentError: a wrong shape, dtype or device, a position out of range (checked where that is free), or an
            implementation that cannot run here.
    """
    require_tensor(feature_map, "feature_map", (4,), "[B, C, H, W]")
    batch, channels, height, width = feature_map.shape
    require_index(positions, "positions", "[n] or [B, n]", (1, 2), height * width, "positions h·W + w")
    if positions.dim() == 2:
        require(positions.shape[0] == batch, "positions", lambda: f"[{batch}, n], a row per image", positions)
    same_device = positions.device == feature_map.device
    require(same_device, "positions", lambda: f"the device of `feature_map` ({feature_map.device})", positions.device)
    problem = backends.Problem(
        "gather",
        feature_map.device.type,
        feature_map.dtype,
        channels,
        rows=batch,
        columns=height * width,
        groups=positions.shape[-1],
    )
    if backends.choose(problem, impl, part=part) == "reference":
        # In the accumulation dtype also without normalisation: gradients of repeated positions are summed in it.
        vectors = reference.gather_positions(feature_map.to(accumulator(feature_map)), positions, normalize=normalize)
        return vectors.to(feature_map.dtype)
    from anomem.ops import sampling

    return sampling.gather_positions(feature_map, positions.contiguous(), normalize)


def variance_hinge(
    x: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    eps: float | Tensor = 1e-4,
    reduction: Literal["mean", "none"] = "mean",
    impl: Impl = "auto",
    part: bool = False,
) -> Tensor:
    """The variance term: (1/d) Σ_j max(0, gamma − sqrt(Var_k(x_kj) + eps)) (VICReg, Bardes et al. 2022, Eq. 1).

    Args:
        x: [B, d] or [G, B, d], B ≥ 2; the unbiased variance is over B.
        gamma: target standard deviation > 0, in the unit of x; a number, or a 0-dim tensor on the CPU (a schedule).
        eps: > 0, keeps the square root differentiable; as gamma.
        reduction: "mean" over the groups, or "none".
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.
        part: where the named implementation has no such kernel, choose by "auto".

    Returns:
        0-dim, or [G] for "none" (0-dim for a two-axis x); float32 (float64 for float64).

    Raises:
        ArgumentError: a wrong shape, dtype or number, fewer than two rows, or an implementation that cannot run here.
    """
    require_tensor(x, "x", (2, 3), "[B, d] or [G, B, d]")
    require(x.shape[-2] >= 2, "x", "at least two rows to have a variance", x)
    require(x.shape[-1] > 0, "x", "rows of length d ≥ 1", x)
    for value, name in ((gamma, "gamma"), (eps, "eps")):
        require_schedule(value, name)
        require(isinstance(value, Tensor) or value > 0, name, "a number > 0", value)
    require_choice(reduction, "reduction", ("mean", "none"))
    grouped = x if x.dim() == 3 else x[None]
    groups, batch, features = grouped.shape
    problem = backends.Problem("variance", x.device.type, x.dtype, features, rows=batch, groups=groups)
    if backends.choose(problem, impl, part=part) == "reference":
        loss = reference.variance_hinge(grouped.to(accumulator(x)), gamma, eps)
    else:
        from anomem.ops import sampling

        loss = sampling.variance_hinge(grouped.contiguous(), *numbers(gamma, eps))
    if reduction == "mean":
        return loss.mean()
    return loss if x.dim() == 3 else loss[0]
