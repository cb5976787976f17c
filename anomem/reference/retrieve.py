"""Memory retrieval, Eq. (1) of AnoMem: the read of a modern Hopfield network (Ramsauer et al. 2021, Eq. 10).

Also the row normalisation in front of it. The gradients that the fused kernels compute, with upstream gradients dO of
`out` and dL of `lse`, q and K normalised, b = beta, S = b q Kᵀ, P = softmax(S), O = P V:

    dV_m   = Σ_n P_nm dO_n
    dP_nm  = dO_n · V_m
    dS_nm  = P_nm (dP_nm − delta_n + dL_n),    delta_n = Σ_m P_nm dP_nm = dO_n · O_n
    dq_n   = b Σ_m dS_nm K_m
    dK_m   = b Σ_n dS_nm q_n                   (+ dV_m where V = K)
    dbeta  = Σ_nm dS_nm q_n · K_m

The backward recomputes P_nm = exp(S_nm − lse_n) from the saved lse, and delta_n from the saved output: no [N, M]
matrix is kept. Through the normalisation, with y = norm(x) and dy its gradient:

    unit length   dx = (dy − y (y · dy)) / |x|
    LayerNorm     dx = (dy − mean(dy) − y mean(y dy)) / sqrt(var(x) + 1e-5)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Normalize = Literal["layer", "l2", "none"]
NORMALIZE: tuple[Normalize, ...] = get_args(Normalize)

LAYER_EPS = 1e-5
L2_EPS = 1e-12


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation (jvp, jacfwd, `forward_ad.dual_level`) is open."""
    return forward_ad._current_level >= 0  # −1 when none is


def layer_normalize(x: Tensor) -> Tensor:
    """LayerNorm without affine: (x − mean) / sqrt(var + 1e-5) over the last axis (biased variance).

    Args:
        x: [..., d].

    Returns:
        [..., d].
    """
    x = _shrunk(x)
    if in_forward_mode():  # torch's layer_norm has no tangent of its tangent, and gives a wrong one
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + LAYER_EPS).sqrt()
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_EPS)


def l2_normalize(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last axis; a zero row stays zero and passes no gradient.

    Args:
        x: [..., d].

    Returns:
        [..., d].
    """
    x = _shrunk(x)
    length = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    # The norm has no derivative at zero. A where on both sides of it keeps a zero row's gradient at zero, in the
    # second derivative too.
    nonzero = (length > L2_EPS) | length.isnan()
    safe = torch.where(nonzero, x, torch.ones_like(x))
    unit = safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True)
    return torch.where(nonzero, unit, torch.zeros_like(unit))


def _shrunk(x: Tensor) -> Tensor:
    """x [..., d]; rows with elements so large that their squares may overflow are scaled down.

    Neither normalisation depends on the factor: the constant 1e-5 is nothing beside the variance of such a row.
    """
    if x.dtype == torch.float16 or x.shape[-1] == 0:  # float16: squares are summed in float32
        return x
    power, largest = (256, 1024) if x.dtype == torch.float64 else (32, 128)
    peak = x.detach().abs().amax(dim=-1, keepdim=True)  # [..., 1]
    # 1 for every row of ordinary size. The upper bound keeps an infinity an infinity.
    return x * (peak * 2.0**-power).clamp(1.0, 2.0 ** (largest - power)).reciprocal()


def normalize_rows(x: Tensor, normalize: Normalize) -> Tensor:
    """`norm(x)` of Eq. (1): LayerNorm without affine, unit length, or x itself.

    Args:
        x: [..., d].
        normalize: "layer", "l2" or "none".

    Returns:
        [..., d].
    """
    if normalize == "layer":
        return layer_normalize(x)
    if normalize == "l2":
        return l2_normalize(x)
    return x


class Retrieval(NamedTuple):
    """What one read of the memory gives."""

    out: Tensor
    """[..., dv], what the memory returns for each query."""
    lse: Tensor
    """[...], logsumexp over the prototypes of beta·q·k; −lse/beta is the Hopfield energy up to terms in |q|²."""
    weights: Tensor
    """[..., M], the retrieval weights that multiplied the values (after shrinkage, if any)."""


def hopfield_retrieve(
    query: Tensor,
    prototypes: Tensor,
    *,
    values: Tensor | None = None,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
    shrink: float | Tensor = 0.0,
    log_prior: Tensor | None = None,
    kept: Tensor | None = None,
) -> Retrieval:
    """HF(q) = softmax(beta · norm(q) norm(K)ᵀ) V, row by row; V = norm(K) unless given.

    Args:
        query: [..., d].
        prototypes: [M, d], the stored patterns K.
        values: [M, dv], read instead of the normalised prototypes.
        beta: inverse temperature, a number or a 0-dim tensor; 1/sqrt(d) when None.
        steps: number of reads; all but the last update the state, q ← softmax(beta q Kᵀ) K.
        normalize: what is done to query and prototypes first; "none" leaves both alone.
        shrink: hard-shrinkage threshold on the weights (MemAE, Gong et al. 2019, Eq. 7), a number or a 0-dim tensor; 0
            keeps the softmax.
        log_prior: [..., M], added to the logits of the last read (`log pi(prototype | position)`).
        kept: [..., M] bool, as `shrink_weights` takes it.

    Returns:
        `Retrieval(out, lse, weights)`; `lse` is of the logits of the last read, before any shrinkage.
    """
    logits, keys = retrieval_logits(query, prototypes, beta=beta, steps=steps, normalize=normalize)
    if log_prior is not None:
        logits = logits + log_prior
    lse = torch.logsumexp(logits, dim=-1)  # [...]
    weights = retrieval_weights(logits, shrink, kept)  # [..., M]
    return Retrieval(weights @ (keys if values is None else values), lse, weights)


def retrieval_logits(
    query: Tensor,
    prototypes: Tensor,
    *,
    beta: float | Tensor | None = None,
    steps: int = 1,
    normalize: Normalize = "layer",
) -> tuple[Tensor, Tensor]:
    """beta · norm(q) norm(K)ᵀ of the last read [..., M], and norm(K) [M, d]; arguments as in `hopfield_retrieve`."""
    state = normalize_rows(query, normalize)  # [..., d]
    keys = normalize_rows(prototypes, normalize)  # [M, d]
    if beta is None:
        beta = query.shape[-1] ** -0.5
    for _ in range(steps - 1):
        state = torch.softmax(beta * (state @ keys.mT), dim=-1) @ keys
    return beta * (state @ keys.mT), keys


def retrieval_weights(logits: Tensor, shrink: float | Tensor = 0.0, kept: Tensor | None = None) -> Tensor:
    """The softmax of logits [..., M], shrunk by `shrink_weights` where `shrink` > 0."""
    weights = torch.softmax(logits, dim=-1)
    if isinstance(shrink, Tensor) or shrink > 0:  # the value of a tensor is not read
        weights = shrink_weights(weights, shrink, kept)
    return weights


def shrink_weights(weights: Tensor, threshold: float | Tensor, kept: Tensor | None = None) -> Tensor:
    """Hard shrinkage with renormalisation (MemAE, Gong et al. 2019, Eqs. 6–7).

    w ← relu(w − t) · w / (|w − t| + 1e-12), then w ← w / max(Σ w, 1e-12). A row all of whose weights are at or below
    the threshold becomes zero: such a query retrieves nothing.

    Args:
        weights: [..., M], non-negative, rows sum to 1.
        threshold: t ≥ 0; MemAE recommends 1/M to 3/M.
        kept: [..., M] bool, which weights another computation found above t: a weight at t rounds to either side. The
            1e-12 of the first step is left out. None compares.

    Returns:
        [..., M], rows sum to 1 or to 0.
    """
    if kept is None:
        excess = weights - threshold
        shrunk = torch.relu(excess) * weights / (excess.abs() + 1e-12)
    else:
        shrunk = torch.where(kept, weights, 0.0)
    return shrunk / shrunk.sum(dim=-1, keepdim=True).clamp_min(1e-12)


def weights_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each row of weights, with 0 · log 0 = 0.

    Args:
        weights: [..., M].

    Returns:
        [...].
    """
    # xlogy's slope is infinite at 0, where a shrunk weight sits; the entropy's own slope there is multiplied by the
    # zero slope of the shrinkage, so the zero is taken out before the logarithm.
    safe = torch.where(weights > 0, weights, torch.ones_like(weights))
    return -(weights * safe.log()).sum(dim=-1)
