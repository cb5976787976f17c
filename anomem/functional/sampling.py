"""Sampled positions, the gather of them, and the variance hinge."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import numbers
from anomem.ops.library import accumulator
from anomem.rules import Impl
from anomem.validation import (
    require,
    require_choice,
    require_count,
    require_index,
    require_same_device,
    require_schedule,
    require_setting,
    require_tensor,
)


def sample_positions(
    height: int,
    width: int,
    ratio: float,
    *,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """n = max(1, floor(H·W·ratio)) distinct positions of a map, uniform (Algorithm 1, line 3).

    Args:
        height: H ≥ 1 of the map.
        width: W ≥ 1 of the map.
        ratio: sampling ratio r of the scale, in (0, 1].
        batch: None for one draw that serves the whole batch, B ≥ 1 for one draw per image.
        generator: source of randomness, on `device`.
        device: of the positions.

    Returns:
        [n] int64 flat indices h·W + w, or [B, n] for a draw per image; `gather_positions` takes both.

    Raises:
        ArgumentError: a number outside of its range.

    Example:
        >>> positions = sample_positions(8, 8, 0.25)
        >>> gather_positions(torch.randn(4, 32, 8, 8), positions).shape
        torch.Size([16, 4, 32])
    """
    require_count(height, "height", 1)
    require_count(width, "width", 1)
    require_setting(ratio, "ratio")
    require(0 < ratio <= 1, "ratio", "a part of the positions in (0, 1]", ratio)
    if batch is not None:
        require_count(batch, "batch", 1)
    return reference.sample_positions(height, width, ratio, batch=batch, generator=generator, device=device)


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
    require_same_device(positions, "positions", feature_map, "feature_map")
    problem = rules.problem_of(
        "gather",
        feature_map,
        positions,
        features=channels,
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


def require_hinge(gamma: float | Tensor, eps: float | Tensor) -> None:
    """The numbers of the variance term, as `variance_hinge` takes them."""
    for value, name in ((gamma, "gamma"), (eps, "eps")):
        require_schedule(value, name)
        require(isinstance(value, Tensor) or value > 0, name, "a number > 0", value)


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
    require_hinge(gamma, eps)
    require_choice(reduction, "reduction", ("mean", "none"))
    grouped = x if x.dim() == 3 else x[None]
    groups, batch, features = grouped.shape
    problem = rules.problem_of("variance", x, features=features, rows=batch, groups=groups)
    if backends.choose(problem, impl, part=part) == "reference":
        loss = reference.variance_hinge(grouped.to(accumulator(x)), gamma, eps)
    else:
        from anomem.ops import sampling

        loss = sampling.variance_hinge(grouped.contiguous(), *numbers(gamma, eps))
    if reduction == "mean":
        return loss.mean()
    return loss if x.dim() == 3 else loss[0]
